"""A Megatron script under a plan of one module, which Megatron lays out: what its ranks leave for a check.

The files are those of `runtime.dumps`, which a plan of several modules leaves.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist

from megatron_mosaic.adapters.stock import run_script
from megatron_mosaic.parallel_state_ext.optimizers.shards import list_shards
from megatron_mosaic.parallel_state_ext.rebound.rebind import watch_steps
from megatron_mosaic.parity.scripts.weights import Named, NameParameters, draw, naming
from megatron_mosaic.plan import Plan
from megatron_mosaic.runtime.dumps.place import Place
from megatron_mosaic.runtime.parameters import is_first_of_tp, is_first_replica
from megatron_mosaic.runtime.telemetry.appended import AppendedLines
from megatron_mosaic.runtime.telemetry.step_report import LOSSES_FILE, MEASURES_FILE

_NOT_MEASURED = (
    "peak_activation_bytes_by_module",
    "empty_units_by_module",
    "imbalance_by_owner",
    "imbalance_by_module",
)


def main(script: str, words: Sequence[str], plan: Plan, directory: str) -> int:
    """Run the script on this rank, and write losses, gradients of every step, parameters at the end."""
    run = _Run(Path(directory), naming(plan))
    watch_steps(run.take, run.before_step, run.after_step)
    run_script(script, words, plan)
    run.finish()
    return 0


class _Run:
    """One rank's run: counts in `_step`, keeps the `_chunks` that the loop builds, the file of its `_losses`."""

    def __init__(self, directory: Path, name: NameParameters) -> None:
        self._directory, self._name, self._step = directory, name, 0
        self._chunks: list[Any] = []
        self._losses: list[AppendedLines] = []

    def take(self, chunks: Sequence[Any]) -> None:
        """The model, before its optimizer is built: its weights are drawn by name."""
        from megatron.training import get_args

        draw(self._name(chunks), get_args().seed)
        self._chunks.extend(chunks)
        if dist.get_rank() == dist.get_world_size() - 1:  # of the last stage: it has the losses
            self._losses.append(AppendedLines(self._directory / LOSSES_FILE))
            (self._directory / MEASURES_FILE).write_text(json.dumps({key: {} for key in _NOT_MEASURED}))

    def before_step(self, optimizer: Any) -> None:
        """Write the gradients that the optimizer is about to use."""
        shards = list_shards(optimizer)
        arrays: dict[str, np.ndarray] = {}
        for each in self._name(self._chunks):
            if not each.parameter.requires_grad:
                continue
            flat = each.parameter.main_grad.reshape(-1)  # type: ignore[attr-defined]
            if shards is None:
                own, is_ours = slice(0, None), is_first_replica(each.model, each.own, each.parameter)
            else:
                own = shards.get(each.parameter, slice(0, 0))
                is_ours = is_first_of_tp(each.model, each.own, each.parameter)
            if is_ours and len(flat[own]):
                arrays |= _placed(each, flat[own].float().numpy(), own.start)
        self._save(f"step-{self._step:04d}", arrays)

    def after_step(self, losses: Mapping[str, Any]) -> None:
        """Write the losses of a step down."""
        self._step += 1
        for file in self._losses:
            file.append(self._step, {name: float(value) for name, value in losses.items()})

    def finish(self) -> None:
        """Write the parameters down."""
        arrays: dict[str, np.ndarray] = {}
        for each in self._name(self._chunks):
            arrays |= _placed(each, each.parameter.detach().reshape(-1).float().numpy(), 0)
        self._save("parameters", arrays)

    def _save(self, what: str, arrays: Mapping[str, np.ndarray]) -> None:
        np.savez(self._directory / f"{what}-rank-{dist.get_rank():05d}.npz", **arrays)  # type: ignore[arg-type]


def _placed(each: Named, values: np.ndarray, start: int) -> dict[str, np.ndarray]:
    place = Place(name=each.whole, cut=each.cut, shape=tuple(each.parameter.shape), start=start)
    return {place.key: values}
