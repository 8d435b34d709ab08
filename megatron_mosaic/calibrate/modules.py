"""Seconds of a module's parts over items, tp and threads, and of its optimizer: a part of `mosaic calibrate`."""

from __future__ import annotations

import statistics
import time
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import MegatronModule, TransformerConfig
from torch import Tensor

from megatron_mosaic.any2any.definition import Any2Any
from megatron_mosaic.cost_model.hardware.profile import Part
from megatron_mosaic.definition import StageInputs
from megatron_mosaic.parallel_state_ext.boundaries.channels.row_channel import Place
from megatron_mosaic.parallel_state_ext.boundaries.items import Integers, Shard, rows_of, shard_of
from megatron_mosaic.parallel_state_ext.grids import Grids
from megatron_mosaic.parallel_state_ext.group_list import FIELDS
from megatron_mosaic.parallel_state_ext.rank_view import RankView
from megatron_mosaic.parallel_state_ext.scope import Scopes
from megatron_mosaic.plan import Layout, ModulePlan, Plan, RankSet, ScheduleChoice
from megatron_mosaic.runtime.model import empty_stage, initialize_by_name

ITEMS = (1, 2, 4, 8, 16)
REPEATS = 9
_NOTHING = TransformerConfig(num_layers=1, hidden_size=1, num_attention_heads=1)
_PIPELINE = 4  # stages into which a module is cut to see its parts: first, inner and last


class _PipelinePlace:
    """Stands for a pipeline group when a stage is built alone: only its rank and size are asked for."""

    def __init__(self, rank: int) -> None:
        self._rank = rank

    def rank(self) -> int:
        return self._rank

    def size(self) -> int:
        return _PIPELINE


def _place(items: Integers, starts: Integers, rows: Integers, num_items: int) -> Place:
    """Where the rows of the first items stand."""
    kept = items < num_items
    tokens, owners = rows_of(items[kept], starts[kept], rows[kept])
    return torch.from_numpy(tokens), torch.from_numpy(owners)


def _build_stages(
    args: Any, definition: Any2Any, name: str, tp: int, groups: ProcessGroupCollection
) -> dict[str, DistributedDataParallel]:
    """First, inner and last stage of a pipeline that is not there."""
    placed = ModulePlan(ranks=RankSet.of(range(tp * _PIPELINE)), layout=Layout(tp=tp, pp=_PIPELINE))
    stages = {}
    for place, stage_idx in (("first", 0), ("inner", 1), ("last", _PIPELINE - 1)):
        seen = {field: getattr(groups, field) for field in FIELDS} | {"pp": _PipelinePlace(stage_idx)}
        stage: MegatronModule = definition.build_stage(name, placed, stage_idx, ProcessGroupCollection(**seen))
        stage.pg_collection = groups
        initialize_by_name(stage, name, args.seed)
        config = DistributedDataParallelConfig()
        stages[place] = DistributedDataParallel(stage.config, config, stage, pg_collection=groups)
    return stages


class ModuleBench:
    """First, inner and last stage of one module on ranks 0..tp-1, ready to be timed. Collective over all ranks."""

    def __init__(self, args: Any, definition: Any2Any, name: str, tp: int) -> None:
        self._definition, self._name, self._tp = definition, name, tp
        self._sizes = definition.workload.by_name[name]
        plan = Plan(
            workload=definition.workload.name,
            world_size=dist.get_world_size(),
            global_batch_size=1,
            micro_batch_size=1,
            schedule=ScheduleChoice("1f1b"),
            modules={name: ModulePlan(ranks=RankSet.of(range(tp)), layout=Layout(tp=tp))},
        )
        view = RankView.of(plan, dist.get_rank())
        self._grids = Grids(view, timeout=timedelta(minutes=2))
        self._scopes = Scopes(args.seed, view)
        self._takes_part = name in self._grids.collections
        groups = self._grids.collections.get(name)
        self._stages = {} if groups is None else _build_stages(args, definition, name, tp, groups)

    def measure(self, batch: Any, threads: int) -> list[dict[str, Any]]:
        """Points of all parts, on rank 0 (others return what they saw too)."""
        points: dict[Part, list[dict[str, Any]]] = {part: [] for part in Part}
        torch.set_num_threads(threads)
        for num_items in ITEMS if self._takes_part else ():
            seconds = {place: self._time(place, batch, num_items) for place in self._stages}
            inner = seconds["inner"]
            for part, place in ((Part.pre, "first"), (Part.layer, "inner"), (Part.post, "last")):
                extra = [
                    s if part is Part.layer else max(0.0, s - i) for s, i in zip(seconds[place], inner, strict=True)
                ]
                forward_s, backward_s = extra
                points[part].append(
                    {"part": part.value, "items": num_items, "forward_s": forward_s, "backward_s": backward_s}
                )
        torch.set_num_threads(1)
        dist.barrier()
        return [point for part in Part for point in points[part]]

    def _time(self, place: str, batch: Any, num_items: int) -> tuple[float, float]:
        """Median seconds of forward and backward."""
        forwards, backwards = [], []
        for _ in range(REPEATS + 1):
            inputs = self._inputs(place, batch, num_items)
            started = time.perf_counter()
            with self._scopes.enter(self._name):
                output = self._stages[place](inputs)
            forwards.append(time.perf_counter() - started)
            ends = [t for t in (output.hidden, output.loss, *output.exports.values()) if t is not None and t.numel()]
            gradients = [torch.ones_like(t) for t in ends]
            started = time.perf_counter()
            with self._scopes.enter(self._name):
                torch.autograd.backward(ends, gradients)
            backwards.append(time.perf_counter() - started)
        return statistics.median(forwards[1:]), statistics.median(backwards[1:])

    def _inputs(self, place: str, batch: Any, num_items: int) -> StageInputs:
        """What a stage gets for the first items of the batch; values that come from other ranks are noise."""
        placed = ModulePlan(ranks=RankSet.of(range(self._tp)), layout=Layout(tp=self._tp))
        shard = shard_of(placed, range(num_items), self._definition.list_items(batch)[self._name].tokens)
        tensors = self._definition.select_inputs(self._name, batch, shard)
        if place == "inner":
            return StageInputs(shard=shard, tensors=tensors, hidden=self._noise(shard))
        imports, imports_at, exports_at = {}, {}, {}
        for edge in self._definition.workload.edges:
            links = self._definition.list_links(edge, batch)
            if place == "first" and edge.target == self._name:
                imports_at[edge.source] = _place(links.target_items, links.target_starts, links.rows, num_items)
                rows = len(imports_at[edge.source][0])
                imports[edge.source] = torch.randn(rows, edge.width, requires_grad=True)
            if place == "last" and edge.source == self._name:
                exports_at[edge.target] = _place(links.source_items, links.source_starts, links.rows, num_items)
        return StageInputs(
            shard=shard,
            tensors=tensors,
            hidden=None if place == "first" else self._noise(shard),
            imports=imports,
            imports_at=imports_at,
            exports_at=exports_at,
        )

    def _noise(self, shard: Shard) -> Tensor:
        return torch.randn(len(shard.tokens), len(shard.items), self._sizes.hidden_size, requires_grad=True)

    def measure_optimizer(self) -> dict[int, float]:
        """Parameters -> seconds of one step, for the first stage and for all three together."""
        timings: dict[int, float] = {}
        config = OptimizerConfig(optimizer="adam", lr=1e-3, weight_decay=0.01)
        groups = self._grids.collections.get(self._name) or self._grids.alone_view()
        for chunks in (list(self._stages.values())[:1], list(self._stages.values())):
            # Megatron gathers parameter groups over the world, so every rank builds; only rank 0 has stages
            built = get_megatron_optimizer(
                config,
                chunks or [empty_stage(_NOTHING, DistributedDataParallelConfig(), groups)],
                use_gloo_process_groups=False,
                pg_collection=groups,
            )
            if chunks:
                seconds = []
                for _ in range(REPEATS + 1):
                    started = time.perf_counter()
                    built.step()
                    seconds.append(time.perf_counter() - started)
                timings[sum(p.numel() for p in built.get_parameters())] = statistics.median(seconds[1:])
        return timings

    def close(self) -> None:
        self._grids.destroy()
