"""One Megatron optimizer per module, one gradient norm over all of them, one decision whether to step.

    module a: Megatron optimizer in a's groups --norm^2--+
    module b: Megatron optimizer in b's groups --norm^2--+--MAX over the world--> sqrt(sum) --> clip all, step all
                                      found_inf ---------+--MAX over the world--> skip all

MAX, because every rank of a module holds the same value and all others hold 0: each module counts once. Where every
rank runs every module, all know all of it already, and nothing is sent.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import extract_matching_values, merge
from megatron.core.dist_checkpointing.mapping import (
    LocalNonpersistentObject,
    ShardedBase,
    ShardedObject,
    ShardedStateDict,
)
from megatron.core.dist_checkpointing.utils import add_prefix_for_sharding
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer.optimizer import ChainedOptimizer, MegatronOptimizer
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_mosaic.parallel_state_ext.optimizers.saved_state import build_record, fill_from_record
from megatron_mosaic.parallel_state_ext.rebound.cpu import device
from megatron_mosaic.parallel_state_ext.rebound.torch_adam import accept_torch_adam

Stepped = tuple[bool, float | None, int | None]  # whether it was, the global gradient norm, None as Megatron wants it
Around = Callable[["ModuleOptimizers", Callable[[], Stepped]], Stepped]  # runs a step of theirs that it is given


class NotFinite(StrEnum):
    """What to do with a step whose gradients are inf or NaN."""

    skip = "skip"  # no module is stepped, on any rank
    refuse = "refuse"  # a FloatingPointError on every rank


def just_run(_: ModuleOptimizers, step: Callable[[], Stepped]) -> Stepped:
    """The step with nothing around it."""
    return step()


class ModuleOptimizers(ChainedOptimizer):
    """The optimizers of this rank's modules, stepped as one.

    `names` are all modules of the plan, also those of other ranks. Collective: `step` is called by every rank of
    `world`, ranks without a module included. No `world`: every rank runs every module. `around` runs every step: the
    place to look at finished gradients, and to measure.
    """

    def __init__(
        self,
        names: tuple[str, ...],
        by_module: Mapping[str, MegatronOptimizer],
        collections: Mapping[str, ProcessGroupCollection],
        config: OptimizerConfig,
        world: dist.ProcessGroup | None,
        *,
        not_finite: NotFinite = NotFinite.skip,
        around: Around = just_run,
    ) -> None:
        super().__init__(list(by_module.values()))
        self.config = config
        self.by_module = dict(by_module)
        self._names, self._collections, self._world = names, collections, world
        self._not_finite, self._around = not_finite, around

    @torch.no_grad()
    def step(self) -> Stepped:
        """(stepped, global gradient norm, None). Nothing is stepped anywhere if any module found inf or NaN.

        With `NotFinite.refuse` that is a FloatingPointError on every rank, and names the modules.
        """
        return self._around(self, self._step_all)

    def _step_all(self) -> Stepped:
        statistics = torch.zeros(2, len(self._names), dtype=torch.float64, device=device())  # norm^2, not finite
        for name, optimizer in self.by_module.items():
            found_inf = optimizer.prepare_grads()
            norm = float(optimizer.get_grad_norm())
            if found_inf or not math.isfinite(norm):  # as a flag: a maximum over ranks may lose a NaN
                statistics[1, self._names.index(name)] = 1.0
            else:
                statistics[0, self._names.index(name)] = norm**2
        if self._world is not None:
            dist.all_reduce(statistics, op=dist.ReduceOp.MAX, group=self._world)
        broken = [name for name, flag in zip(self._names, statistics[1].tolist(), strict=True) if flag]
        if broken and self._not_finite is NotFinite.refuse:
            raise FloatingPointError(
                f"gradients of {', '.join(broken)} are inf or NaN: no module was stepped; start again from the last "
                "checkpoint, or skip such steps with --no-check-for-nan-in-loss-and-grad"
            )
        if broken:
            return False, None, None
        norm = math.sqrt(float(statistics[0].sum()))
        stepped = True
        for optimizer in self.by_module.values():
            parameters = optimizer.get_parameters()
            if self.config.clip_grad > 0 and parameters:
                clip_grad_by_total_norm_fp32(parameters, self.config.clip_grad, norm)
            stepped &= optimizer.step_with_ready_grads()
        return stepped, norm, None

    def sharded_state_dict(
        self, model_sharded_state_dict: ShardedStateDict, is_loading: bool = False, **kwargs: Any
    ) -> ShardedStateDict:
        """State per module, every key under the module's name, so that modules never collide in a checkpoint.

        What is not sharded (step counts, learning rates) would be saved by rank 0 alone, which may not run the module;
        it travels as one record per module instead, that fits any layout.
        """
        states: ShardedStateDict = {}
        for name, optimizer in self.by_module.items():
            if optimizer.is_stub_optimizer:  # nothing of this module is trained on this rank
                sharded, common = {}, {}
            else:
                state = optimizer.sharded_state_dict(model_sharded_state_dict, is_loading, **kwargs)
                sharded, common = extract_matching_values(state, _is_placed)
                add_prefix_for_sharding(sharded, f"{name}.optimizer.")
            groups = self._collections[name]
            record = {} if is_loading else build_record(common, groups.intra_dist_opt)
            replica = (groups.pp.rank(), groups.tp.rank(), groups.dp_cp.rank())
            states[name] = {
                "sharded": sharded,
                "common": ShardedObject(f"{name}.optimizer.common", record, (1,), (0,), replica_id=replica),
                "here": LocalNonpersistentObject(common),
            }
        return states

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        for name, optimizer in self.by_module.items():
            state = state_dict[name]
            if not optimizer.is_stub_optimizer:
                optimizer.load_state_dict(
                    merge(state["sharded"], fill_from_record(state["here"], state["common"], name))
                )


def _is_placed(value: object) -> bool:
    """Whether the checkpoint already knows where this value belongs (or that it stays on its rank)."""
    return isinstance(value, (ShardedBase, LocalNonpersistentObject))


def build_optimizer(
    names: tuple[str, ...],
    modules: Mapping[str, Sequence[DistributedDataParallel]],
    collections: Mapping[str, ProcessGroupCollection],
    absent: DistributedDataParallel,
    world: dist.ProcessGroup | None,
    config: OptimizerConfig,
    config_overrides: Any = None,
    *,
    not_finite: NotFinite = NotFinite.skip,
    around: Around = just_run,
) -> ModuleOptimizers:
    """A Megatron optimizer for each of this rank's modules, in that module's own groups.

    Collective over the world, module by module: Megatron aligns parameter groups with a gather over all ranks, so
    ranks that do not run a module take part with `absent`, a stage without parameters. A module has several stages on a
    rank if they are virtual. `world`, `not_finite`, `around`: see ModuleOptimizers.
    """
    accept_torch_adam()
    by_module = {}
    for name in names:
        stages = list(modules.get(name, [absent]))
        optimizer = get_megatron_optimizer(
            config,
            stages,
            config_overrides=config_overrides,
            use_gloo_process_groups=False,
            pg_collection=collections[name] if name in modules else absent.module.pg_collection,
        )
        if name in modules:
            by_module[name] = optimizer
    return ModuleOptimizers(names, by_module, collections, config, world, not_finite=not_finite, around=around)
