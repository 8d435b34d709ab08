"""Pretraining of the reference model: a Megatron pretrain script whose modules a plan lays out.

torchrun --nproc-per-node 4 scripts/pretrain_any2any.py --mosaic-plan plan.yaml --train-iters 60
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_mosaic.any2any import data, synthetic
from megatron_mosaic.any2any.arguments import (
    MEGATRON_DEFAULTS,
    add_any2any_arguments,
    mix_from_args,
    sizes_from_args,
    workload_from_args,
)
from megatron_mosaic.any2any.definition import Any2Any
from megatron_mosaic.any2any.files.packed import PackedDigits, collate_packed
from megatron_mosaic.definition import StageOutput
from megatron_mosaic.errors import MosaicError, RankFailure
from megatron_mosaic.flight.process import begin_early
from megatron_mosaic.launch.slurm.environment import take_rank_from_slurm
from megatron_mosaic.plan.workload import Workload
from megatron_mosaic.runtime.arguments import parse_and_validate_args
from megatron_mosaic.runtime.model import MosaicModel, StageCall


def loss_func(output: StageOutput) -> tuple[Tensor | None, float | Tensor, dict[str, Tensor]]:
    """(sum over loss tokens, their number, what to log), as Megatron's per-token loss wants it."""
    return output.loss, output.num_tokens, dict(output.report)


def forward_step(
    data_iterator: Iterator[StageCall], model: MosaicModel
) -> tuple[StageOutput, Callable[[StageOutput], Any]]:
    """One stage of one module on one microbatch."""
    return model(next(data_iterator)), loss_func


def make_datasets(args: Any, workload: Workload) -> Callable[[Sequence[int]], tuple[Any, ...]]:
    """Provider of the train, valid and test datasets: digits, or made-up samples of a `--workload`."""

    def provider(num_samples: Sequence[int]) -> tuple[Any, ...]:
        datasets: list[Any] = []
        for split, wanted in zip(("train", "valid", "test"), num_samples, strict=True):
            count = max(1, wanted or 1)
            if args.digits_files is not None:
                datasets.append(PackedDigits(Path(args.digits_files) / split, args.seq_length))
            elif args.workload is None:
                sizes, mix = sizes_from_args(args), mix_from_args(args)
                datasets.append(
                    data.DigitsDataset(split, sizes=sizes, mix=mix, num_samples=count, seed=args.digits_seed)
                )
            else:
                made_up = synthetic.SyntheticDataset(split, workload=workload, num_samples=count, seed=args.digits_seed)
                datasets.append(made_up)
        return tuple(datasets)

    return provider


def make_collate(args: Any, workload: Workload) -> Callable[[Sequence[Any]], dict[str, Tensor]]:
    """What makes a batch of the samples of `make_datasets`."""
    if args.digits_files is not None:
        return collate_packed
    return data.collate if args.workload is None else synthetic.collate(workload)


def train() -> int:
    """Train as the command line says. MosaicError if the input is wrong."""
    args, plan = parse_and_validate_args(workload_from_args, add_any2any_arguments, MEGATRON_DEFAULTS)
    definition = Any2Any.from_args(args, workload_from_args(args))
    from megatron.core.enums import ModelType
    from megatron.training import pretrain

    from megatron_mosaic.runtime.train import Runtime

    workload = definition.workload
    runtime = Runtime(args, plan, definition, make_collate(args, workload))
    provider = runtime.data_provider(make_datasets(args, workload))
    with runtime.finishing():
        pretrain(runtime.container, provider, ModelType.encoder_or_decoder, forward_step, **runtime.seams)
    return 0


def main() -> int:
    """Train. Exit status 2 if the input is wrong, 1 if a rank failed."""
    try:
        take_rank_from_slurm()
        begin_early()
        return train()
    except RankFailure:
        raise
    except MosaicError as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
