"""Bugs in what stages get: rows and hidden states on their way, samples, weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_mosaic.any2any import definition
from megatron_mosaic.any2any.stages import BackboneStage
from megatron_mosaic.colocation.program import RankProgram
from megatron_mosaic.parallel_state_ext.boundaries.channels.hidden_channel import HiddenChannel
from megatron_mosaic.parallel_state_ext.boundaries.exchange import Exchange
from megatron_mosaic.parallel_state_ext.boundaries.step_map import StepMap
from megatron_mosaic.runtime import model, train
from megatron_mosaic.schedules import Kind
from tests.faults.bugs.catalogue import Patch, bug


def _inputs(patch: Patch, module: str, key: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    select = definition.Any2Any.select_inputs

    def changed(self: Any, name: str, *args: Any) -> dict[str, torch.Tensor]:
        found = select(self, name, *args)
        return found | {key: change(found[key])} if name == module and key in found else found

    patch.setattr(definition.Any2Any, "select_inputs", changed)


@bug("loss mask shifted by a token")
def _(patch: Patch) -> None:
    _inputs(patch, "llm", "weights", lambda weights: weights.roll(1, dims=1))


def _exports(patch: Patch, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    send = Exchange.send_exports

    def changed(self: Exchange, module: str, unit: int, exports: Mapping[str, torch.Tensor]) -> None:
        send(self, module, unit, {key: change(rows.detach().clone()) for key, rows in exports.items()})

    patch.setattr(Exchange, "send_exports", changed)


def _row(source: int, target: int, factor: float = 1.0) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(rows: torch.Tensor) -> torch.Tensor:
        if len(rows) > 1:
            rows[target] = factor * rows[source]
        return rows

    return change


@bug("exported rows 0.01 % too large")
def _(patch: Patch) -> None:
    _exports(patch, lambda rows: rows * 1.0001)


@bug("a row dropped on its way")
def _(patch: Patch) -> None:
    _exports(patch, _row(0, -1, 0.0))


@bug("a row doubled on its way")
def _(patch: Patch) -> None:
    _exports(patch, _row(0, 1))


@bug("two images swapped")
def _(patch: Patch) -> None:
    sends = StepMap.sends

    def swapped(self: StepMap, end: Any, unit: int, peer: int) -> Any:
        numbers = np.arange(len(self.rows(end, unit)))
        return tuple(replace(part, rows=numbers[part.rows][::-1].copy()) for part in sends(self, end, unit, peer))

    patch.setattr(StepMap, "sends", swapped)


@bug("every image in its neighbour's place")
def _(patch: Patch) -> None:
    _inputs(patch, "vision", "values", lambda values: values.roll(1, dims=1))


def _import_gradients(patch: Patch, factor: float) -> None:
    send = Exchange.send_import_gradients

    def changed(self: Exchange, module: str, unit: int, imports: Mapping[str, torch.Tensor]) -> None:
        for rows in imports.values():
            if rows.grad is not None:
                rows.grad.mul_(factor)
        send(self, module, unit, imports)

    patch.setattr(Exchange, "send_import_gradients", changed)


@bug("gradients of rows lost on their way back")
def _(patch: Patch) -> None:
    _import_gradients(patch, 0.0)


@bug("gradients of rows counted twice")
def _(patch: Patch) -> None:
    _import_gradients(patch, 2.0)


@bug("gradients between stages 0.1 % too small", "pipelines")
def _(patch: Patch) -> None:
    send = HiddenChannel.send
    patch.setattr(
        HiddenChannel,
        "send",
        lambda self, hidden, *args, towards, **kwargs: send(
            self, hidden * (1 if towards > 0 else 0.999), *args, towards=towards, **kwargs
        ),
    )


@bug("hidden states of the microbatch before", "pipelines")
def _(patch: Patch) -> None:
    send, kept = HiddenChannel.send, {}

    def late(self: HiddenChannel, hidden: torch.Tensor, *args: Any, towards: int, **kwargs: Any) -> None:
        before = kept.get((id(self), towards, hidden.shape), hidden)
        kept[id(self), towards, hidden.shape] = hidden.detach().clone()
        send(self, before if towards > 0 else hidden, *args, towards=towards, **kwargs)

    patch.setattr(HiddenChannel, "send", late)


@bug("two hidden states expected in each other's place", "pipelines")
def _(patch: Patch) -> None:
    of = RankProgram.of

    def swapped(*args: Any) -> RankProgram:
        program = of(*args)
        comes = [t for posts in program.receives.values() for t in posts if t.source.lane == "llm.0"]
        forward = [transfer for transfer in comes if transfer.target.kind is Kind.F]
        return replace(program, receives={None: tuple(reversed(forward[:2]))})

    patch.setattr(RankProgram, "of", swapped)


@bug("angles of other tokens", "context parallel")
def _(patch: Patch) -> None:
    patch.setattr(BackboneStage, "_angles", lambda self, inputs: self.rotary.get_emb(len(inputs.tensors["positions"])))


def _seeds(patch: Patch, of: Callable[[str], int]) -> None:
    initialize = train.initialize_by_name
    patch.setattr(train, "initialize_by_name", lambda stage, name, seed: initialize(stage, name, seed + of(name)))


@bug("weights of one module from another random stream")
def _(patch: Patch) -> None:
    _seeds(patch, lambda module: int(module == "generator"))


@bug("weights of one replica from another random stream")
def _(patch: Patch) -> None:
    _seeds(patch, lambda module: int(module == "vision" and dist.get_rank() == 1))


@bug("every tp rank has the first one's slice of the weights")
def _(patch: Patch) -> None:
    cut_of = model.cut_of

    def first(*args: Any) -> Any:
        cut = cut_of(*args)
        return cut and replace(cut, rank=0)

    patch.setattr(model, "cut_of", first)


@bug("another epsilon in the layer norms")
def _(patch: Patch) -> None:
    config_from_args = definition.config_from_args
    patch.setattr(
        definition,
        "config_from_args",
        lambda *args: replace(config_from_args(*args), layernorm_epsilon=1.1e-5 * 10),
    )
