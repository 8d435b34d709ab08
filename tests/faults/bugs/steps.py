"""Bugs in the optimizer step and in what it leaves on each replica."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_mosaic.parallel_state_ext.optimizers import module_optimizers
from megatron_mosaic.parallel_state_ext.optimizers.module_optimizers import ModuleOptimizers
from megatron_mosaic.runtime import train
from megatron_mosaic.runtime.model import MosaicModel
from tests.faults.bugs.catalogue import BASE, Patch, bug


def _clips(patch: Patch, clip: Callable[..., None]) -> None:
    patch.setattr(module_optimizers, "clip_grad_by_total_norm_fp32", clip)


@bug("norm of the gradients counted twice")
def _(patch: Patch) -> None:
    clip = module_optimizers.clip_grad_by_total_norm_fp32
    _clips(patch, lambda parameters, limit, norm: clip(parameters, limit, 2 * norm))


@bug("no clipping")
def _(patch: Patch) -> None:
    _clips(patch, lambda *args: None)


@bug("norm of this rank's modules alone")
def _(patch: Patch) -> None:
    patch.setattr(module_optimizers, "dist", SimpleNamespace(all_reduce=lambda *a, **k: None, ReduceOp=dist.ReduceOp))


def around_step(patch: Patch, before: Callable[[ModuleOptimizers], Callable[[], None]]) -> None:
    """`before(optimizers)` runs before each optimizer step; what it returns runs after it."""
    step_all = ModuleOptimizers._step_all

    def wrapped(self: ModuleOptimizers) -> Any:
        after = before(self)
        result = step_all(self)
        after()
        return result

    patch.setattr(ModuleOptimizers, "_step_all", wrapped)


def groups_of(optimizers: ModuleOptimizers) -> list[dict[str, Any]]:
    """Every parameter group that a step reads, of torch's optimizers."""
    members = [m for o in optimizers.by_module.values() for m in getattr(o, "chained_optimizers", [o])]
    return [group for member in members if member.optimizer for group in member.optimizer.param_groups]


def _settings(patch: Patch, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    def before(optimizers: ModuleOptimizers) -> Callable[[], None]:
        for group in groups_of(optimizers):
            group.update(change(group))
        return lambda: None

    around_step(patch, before)


@bug("learning rate 0.1 % too high")
def _(patch: Patch) -> None:
    _settings(patch, lambda group: {"lr": group["lr"] * 1.001})


@bug("first beta 0.89")
def _(patch: Patch) -> None:
    _settings(patch, lambda group: {"betas": (0.89, group["betas"][1])})


@bug("second beta 0.99")
def _(patch: Patch) -> None:
    _settings(patch, lambda group: {"betas": (group["betas"][0], 0.99)})


@bug("epsilon of the optimizer 1 % too large")
def _(patch: Patch) -> None:
    _settings(patch, lambda group: {"eps": group["eps"] * 1.01})


@bug("no weight decay")
def _(patch: Patch) -> None:
    _settings(patch, lambda group: {"weight_decay": 0.0})


@bug("weight decay of norms and biases")
def _(patch: Patch) -> None:
    _settings(patch, lambda group: {"weight_decay": 0.01})


@bug("learning rate of the step before", "warm-up, own rate")
def _(patch: Patch) -> None:
    get_lr = OptimizerParamScheduler.get_lr

    def late(self: OptimizerParamScheduler, group: dict[str, Any]) -> float:
        before = copy.copy(self)
        before.num_steps = max(0, self.num_steps - BASE.global_batch_size)
        return get_lr(before, group)

    patch.setattr(OptimizerParamScheduler, "get_lr", late)


@bug("own rate of a module ignored", "warm-up, own rate")
def _(patch: Patch) -> None:
    patch.setattr(train, "lr_mults_from_args", lambda args, modules: dict.fromkeys(modules, 1.0))


@bug("frozen parameters decay", "frozen vision")
def _(patch: Patch) -> None:
    _keep_models(patch, lambda model: _decay(model.stages_of("vision")))


@bug("frozen parameters trained", "frozen vision")
def _(patch: Patch) -> None:
    _keep_models(patch, lambda model: [_nudge(p) for stage in model.stages_of("vision") for p in stage.parameters()])


def _keep_models(patch: Patch, after: Callable[[MosaicModel], object]) -> None:
    """`after(model)` runs after each optimizer step, before anybody looks at the parameters."""
    around = train.Runtime._around_optimizer
    patch.setattr(
        train.Runtime,
        "_around_optimizer",
        lambda self, model, optimizers, step: around(self, model, optimizers, lambda: (step(), after(model))[0]),
    )


def _decay(stages: list[Any]) -> None:
    for stage in stages:
        for parameter in stage.parameters():
            parameter.data.mul_(1 - 3e-5)


def _nudge(parameter: torch.nn.Parameter) -> None:
    parameter.data.add_(1e-4)


@bug("one replica not stepped")
def _(patch: Patch) -> None:
    def before(optimizers: ModuleOptimizers) -> Callable[[], None]:
        kept = {p: p.detach().clone() for p in optimizers.by_module["vision"].get_parameters()}

        def after() -> None:
            for parameter, value in kept.items() if dist.get_rank() == 1 else ():
                parameter.data.copy_(value)

        return after

    around_step(patch, before)


@bug("parameters not gathered after the step", "sharded optimizer")
def _(patch: Patch) -> None:
    patch.setattr(DistributedOptimizer, "start_param_sync_for_bucket_group_subset", lambda self: None)


@bug("one replica of an expert's router not stepped", "experts")
def _(patch: Patch) -> None:
    def after(model: MosaicModel) -> None:
        for stage in model.stages_of("llm") if dist.get_rank() == 1 else ():
            for name, parameter in stage.named_parameters():
                if "router" in name:
                    parameter.data.mul_(1.0001)

    _keep_models(patch, after)
