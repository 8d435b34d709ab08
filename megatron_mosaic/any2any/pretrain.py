"""Pretraining of the reference model: a Megatron pretrain script whose modules a plan lays out.

torchrun --nproc-per-node 4 scripts/pretrain_any2any.py --mosaic-plan plan.yaml --train-iters 60
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor

from megatron_mosaic.any2any.arguments import MEGATRON_DEFAULTS, add_any2any_arguments, mix_from_args, sizes_from_args
from megatron_mosaic.any2any.data import DigitsDataset, collate
from megatron_mosaic.any2any.definition import Any2Any
from megatron_mosaic.any2any.sizes import workload
from megatron_mosaic.arguments import parse_and_validate_args
from megatron_mosaic.definition import StageOutput
from megatron_mosaic.errors import MosaicError, RankFailure
from megatron_mosaic.model import MosaicModel, StageCall


def loss_func(output: StageOutput) -> tuple[Tensor | None, int, dict[str, Tensor]]:
    """(sum over loss tokens, their number, what to log), as Megatron's per-token loss wants it."""
    return output.loss, output.num_tokens, dict(output.report)


def forward_step(
    data_iterator: Iterator[StageCall], model: MosaicModel
) -> tuple[StageOutput, Callable[[StageOutput], Any]]:
    """One stage of one module on one microbatch."""
    return model(next(data_iterator)), loss_func


def make_datasets(args: Any) -> Callable[[Sequence[int]], tuple[DigitsDataset, ...]]:
    """Provider of the train, valid and test datasets."""

    def provider(num_samples: Sequence[int]) -> tuple[DigitsDataset, ...]:
        return tuple(
            DigitsDataset(
                split,
                sizes=sizes_from_args(args),
                mix=mix_from_args(args),
                num_samples=max(1, count or 1),
                seed=args.digits_seed,
            )
            for split, count in zip(("train", "valid", "test"), num_samples, strict=True)
        )

    return provider


def main() -> int:
    """Train. Exit status 2 if the input is wrong, 1 if a rank failed."""
    try:
        args, plan = parse_and_validate_args(
            lambda args: workload(sizes_from_args(args), args.global_batch_size or 1, mix_from_args(args)),
            add_any2any_arguments,
            MEGATRON_DEFAULTS,
        )
        from megatron.core.enums import ModelType
        from megatron.training import pretrain

        from megatron_mosaic.train import Runtime

        runtime = Runtime(args, plan, Any2Any.from_args(args))
        provider = runtime.data_provider(make_datasets(args), collate)
        with runtime.finishing():
            pretrain(runtime.container, provider, ModelType.encoder_or_decoder, forward_step, **runtime.seams)
    except RankFailure:
        raise
    except MosaicError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
