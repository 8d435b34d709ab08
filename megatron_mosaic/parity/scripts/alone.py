"""A Megatron script on one process without a plan: the oracle of `mosaic check --script`.

Megatron's own model, data loader, schedule, gradient buffers and optimizer do the work; of ours are what a CPU needs,
the batch of the plan, and the weights, which are drawn by name as under the plan.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_mosaic.adapters.arguments import script_defaults
from megatron_mosaic.adapters.script import run_main
from megatron_mosaic.parallel_state_ext.rebound.rebind import (
    install_vision_norm,
    rebind_arguments,
    rebind_vocabulary_padding,
    watch_steps,
)
from megatron_mosaic.parity.reference_files import ReferenceStep, save_parameters
from megatron_mosaic.parity.scripts.weights import NameParameters, draw, naming
from megatron_mosaic.plan import Plan
from megatron_mosaic.runtime.layers.norms import TorchNorm


def main(script: str, words: Sequence[str], plan: Plan, directory: str) -> int:
    """Run the script on this process, and write a ReferenceStep per step and the parameters at the end."""
    install_vision_norm(TorchNorm)
    rebind_vocabulary_padding()
    _put_batch_into_arguments(plan)
    run = _Run(Path(directory), naming(plan))
    watch_steps(run.take, run.before_step, run.after_step)
    run_main(script, words)
    run.finish()
    return 0


def _put_batch_into_arguments(plan: Plan) -> None:
    def add(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        parser = stock_add(parser)
        # Format torch: pretrain_vlm.py asserts it, and nothing is saved here
        parser.set_defaults(**{**script_defaults(), "ckpt_format": "torch"})
        return parser

    def validate(args: argparse.Namespace, defaults: Any = None) -> Any:
        args.micro_batch_size, args.global_batch_size = plan.micro_batch_size, plan.global_batch_size
        args.calculate_per_token_loss = True
        return stock_validate(args, defaults or {})

    stock_add, stock_validate = rebind_arguments(add=add, validate=validate)


class _Run:
    """One run of the script: counts in `_step`, and keeps the `_chunks` that it builds and the last `_gradients`."""

    def __init__(self, directory: Path, name: NameParameters) -> None:
        self._directory, self._name, self._step = directory, name, 0
        self._chunks: list[Any] = []
        self._gradients: dict[str, np.ndarray] = {}

    def take(self, chunks: Sequence[Any]) -> None:
        """The model, before its optimizer is built: its weights are drawn by name."""
        from megatron.training import get_args

        draw(self._name(chunks), get_args().seed)
        self._chunks.extend(chunks)

    def before_step(self, _: Any) -> None:
        """Keep the gradients that the optimizer is about to use."""
        self._gradients = {
            each.whole: each.parameter.main_grad.float().numpy().copy()  # type: ignore[attr-defined]
            for each in self._name(self._chunks)
            if each.parameter.requires_grad
        }

    def after_step(self, losses: dict[str, Any]) -> None:
        """Write the step down."""
        found = {name: float(value) for name, value in losses.items()}
        step = ReferenceStep(losses=found, gradients=self._gradients, rounding={}, unrepeatable={})
        step.save(self._directory, self._step)
        self._step += 1

    def finish(self) -> None:
        """Write the parameters down."""
        values = {each.whole: each.parameter.detach().float().numpy().copy() for each in self._name(self._chunks)}
        save_parameters(self._directory, values)
