"""Whole plans from priced modules, by arithmetic on arrays: nothing is simulated here.

For every number of samples in flight, the modules beside the backbone become bundles (all on the same ranks, or each on
its own), and every bundle meets every layout of the backbone in each shape:

    colocated   bundle and backbone on ranks from 0 on       step = sum of both    + the way through the pipeline
    disjoint    the bundle on the ranks behind it            step = the slower one + the way through the pipeline

What is kept of each: the fastest that fit by this estimate, and the one that needs least memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from itertools import combinations, product

import numpy as np
from numpy.typing import NDArray

from megatron_mosaic.cost_model.model import CostModel, memory_limit_bytes
from megatron_mosaic.plan import ModulePlan, Plan, RankSet, ScheduleChoice
from megatron_mosaic.plan.layout import Recompute
from megatron_mosaic.search.sketches.module_options import Floats, ModuleOptions, Row
from megatron_mosaic.search.sketches.overlay import Overlaid, Overlay
from megatron_mosaic.search.space import Space

_FRONT = 6  # ways to lay out a module on one number of ranks that go on
_BUNDLES = 8  # and bundles of modules on one number of ranks
_ALIKE = 4  # sketches of each number of samples are kept for every one that is asked for: many are alike
_USUAL_PP = 4  # of a backbone, for ranking what is live


class Shape(StrEnum):
    colocated = "colocated"
    disjoint = "disjoint"


@dataclass(frozen=True, slots=True)
class Choice:
    """A row of one module with the microbatches of its unit."""

    module: str
    row: Row
    unit: int

    def place(self, ranks: RankSet) -> ModulePlan:
        return ModulePlan(
            ranks=ranks,
            layout=self.row.layout,
            unit=self.unit,
            recompute=self.row.recompute,
            sequence_parallel=self.row.sequence_parallel,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Bundle:
    """Modules beside the backbone, on `num_ranks` together: those of one inner tuple share their ranks.

    Seconds of their busiest rank in a step, and of the way of one unit through them. Bytes there: always and by a
    pipeline of one stage behind it, and what each more stage of the backbone keeps alive.
    """

    num_ranks: int
    busy_s: float
    fill_s: float
    bytes: float
    bytes_per_stage: float
    choices: tuple[tuple[Choice, ...], ...]

    @property
    def rank(self) -> float:
        return self.busy_s + self.fill_s

    @property
    def usual_bytes(self) -> float:
        return self.bytes + _USUAL_PP * self.bytes_per_stage


@dataclass(frozen=True, slots=True, kw_only=True)
class Sketch:
    """A plan (under 1F1B) with its estimated step and fullest rank."""

    step_s: float
    bytes: float
    shape: Shape
    plan: Plan

    @property
    def kind(self) -> object:
        """What makes plans different enough to start from both: pipelines, recomputation, and where modules are."""
        modules = self.plan.modules.values()
        return self.shape, tuple((m.layout.pp, m.recompute, len(m.ranks), m.unit > 1) for m in modules)


class Composer:
    """The sketches of a space. `unlimited_s`: of the fastest met so far, whether it fits or not."""

    def __init__(self, space: Space, model: CostModel, *, recomputes: int = len(Recompute)) -> None:
        self._space = space
        self._backbone = space.workload.backbone
        self.options = {
            m.name: ModuleOptions(m, space, model.source, recomputes=recomputes) for m in space.workload.modules
        }
        self._others = [m for m in space.workload.modules if m is not self._backbone]
        self._limit = memory_limit_bytes(space.cluster, space.config.memory_frac)
        self.unlimited_s = math.inf
        self._fronts: dict[tuple[str, int, int], Mapping[int, list[Bundle]]] = {}
        self._found: dict[int, list[Sketch]] = {}
        self._overlay = Overlay(space, model, self.options)

    def sketches(self, keep: int) -> list[Sketch]:
        """The `keep` fastest of each shape that fit, and of each the leanest (first where none fits); fastest first."""
        if keep not in self._found:
            self._found[keep] = self._list(keep)
        return self._found[keep]

    def _list(self, keep: int) -> list[Sketch]:
        fast: dict[object, Sketch] = {}  # by what makes plans different in kind
        lean: dict[Shape, Sketch] = {}
        for samples in self._samples():
            for sketch in self._sketch(samples, _ALIKE * keep):
                if sketch.shape not in lean or sketch.bytes < lean[sketch.shape].bytes:
                    lean[sketch.shape] = sketch
                if sketch.bytes <= self._limit:
                    fast[sketch.kind] = min(fast.get(sketch.kind, sketch), sketch, key=lambda s: s.step_s)
        leading = sorted(fast.values(), key=lambda s: s.step_s)
        found = [s for shape in Shape for s in [each for each in leading if each.shape is shape][:keep]]
        found.sort(key=lambda s: s.step_s)
        return found + [sketch for sketch in lean.values() if sketch not in found]

    def overlaid(self, keep: int, is_over: Callable[[], bool]) -> list[Overlaid]:
        """Modules on any ranks: the `keep` leading plans by step, and by the busiest rank alone."""
        return self._overlay.leading(self._samples(), keep, is_over)

    def _samples(self) -> list[int]:
        """Samples of one microbatch over all lanes of the backbone."""
        dps = sorted(set(self.options[self._backbone.name].dp.tolist()))
        return sorted({dp * size for dp in dps for size in self._space.micro_batch_sizes(dp)})

    def _sketch(self, samples: int, keep: int) -> Iterator[Sketch]:
        space, options = self._space, self.options[self._backbone.name]
        num_microbatches = space.workload.global_batch_size // samples
        sizes = samples // np.maximum(options.dp, 1)
        lanes = zip(options.dp.tolist(), sizes.tolist())
        fits = np.array([samples % dp == 0 and n in space.micro_batch_sizes(dp) for dp, n in lanes], dtype=bool)
        rows = np.flatnonzero(fits)
        if not len(rows):
            return
        unit_s, held, live = options.costs(rows, sizes[rows])
        priced = np.isfinite(unit_s) & np.isfinite(options.tail_s[rows])
        rows, unit_s, held, live = rows[priced], unit_s[priced], held[priced], live[priced]
        pp = options.pp[rows]
        busy = num_microbatches * unit_s + options.tail_s[rows]
        fill = (pp - 1) * unit_s
        held = held + np.minimum(pp, num_microbatches) * live
        bundles = self._bundles(samples, num_microbatches)
        if not len(rows) or not bundles:
            return
        ranks = options.num_ranks[rows]
        for shape in Shape:
            if shape is Shape.disjoint and not self._others:
                continue
            step_s, size_bytes = self._pairs(shape, bundles, ranks, busy, fill, held, pp)
            self.unlimited_s = min(self.unlimited_s, float(step_s.min(initial=math.inf)))
            for at in _picks(step_s, size_bytes, self._limit, keep):
                i, j = divmod(at, len(bundles))
                plan = self._plan(shape, samples, options.rows[rows[i]], bundles[j])
                if plan is not None:
                    yield Sketch(
                        step_s=float(step_s.flat[at]), bytes=float(size_bytes.flat[at]), shape=shape, plan=plan
                    )

    def _pairs(
        self,
        shape: Shape,
        bundles: Sequence[Bundle],
        ranks: NDArray[np.int64],
        busy: Floats,
        fill: Floats,
        held: Floats,
        pp: NDArray[np.int64],
    ) -> tuple[Floats, Floats]:
        """[backbone rows, bundles]: seconds of a step and bytes of the fullest rank; infinite where ranks lack."""
        n, other_busy, other_fill, other_bytes, by_stage = (
            np.array([getattr(b, name) for b in bundles], dtype=float)[None, :]
            for name in ("num_ranks", "busy_s", "fill_s", "bytes", "bytes_per_stage")
        )
        ranks, pp = ranks[:, None], pp[:, None]
        busy, fill, held = busy[:, None], fill[:, None], held[:, None]
        theirs = other_bytes + by_stage * pp
        if shape is Shape.colocated:
            alone = np.array([len(b.choices) <= 1 for b in bundles])[None, :]
            step_s, size_bytes, fits = (
                busy + other_busy,
                held + theirs,
                alone & (ranks <= self._space.cluster.num_ranks),
            )
        else:
            step_s, size_bytes = np.maximum(busy, other_busy), np.maximum(held, theirs)
            fits = (n > 0) & (ranks + n <= self._space.cluster.num_ranks)
        return np.where(fits, step_s + fill + other_fill, math.inf), np.where(fits, size_bytes, math.inf)

    def _plan(self, shape: Shape, samples: int, row: Row, bundle: Bundle) -> Plan | None:
        own = Choice(self._backbone.name, row, 1)
        groups = [(own,), *(together for together in bundle.choices if together)]
        if shape is Shape.disjoint:
            starts = self._find_ranks(groups)
        else:
            starts = [RankSet.block(0, group[0].row.layout.num_ranks) for group in groups]
        if starts is None:
            return None
        modules = {
            choice.module: choice.place(self._pinned(choice) or ranks)
            for group, ranks in zip(groups, starts)
            for choice in group
        }
        plan = self._space.make_plan(samples // row.layout.dp, modules, ScheduleChoice("1f1b"))
        return plan if has_schedule(self._space, plan) else None

    def _pinned(self, choice: Choice) -> RankSet | None:
        return self._space.config.pin.of(choice.module).rank_set

    def _find_ranks(self, groups: Sequence[Sequence[Choice]]) -> list[RankSet] | None:
        """Of each group ranks of its own: where pins are, else the first that are free. None where there are none."""
        pinned = [[ranks for each in group if (ranks := self._pinned(each)) is not None] for group in groups]
        if any(a.overlaps(b) for one, other in combinations(pinned, 2) for a in one for b in other):
            return None
        taken, found = [ranks for each in pinned for ranks in each], []
        for group, own in zip(groups, pinned):
            size = group[0].row.layout.num_ranks
            starts = sorted({0, *(end for ranks in taken for _, end in ranks.spans)})
            blocks = [RankSet.block(start, size) for start in starts if start + size <= self._space.cluster.num_ranks]
            free = own or [each for each in blocks if not any(each.overlaps(ranks) for ranks in taken)]
            if not free:
                return None
            found.append(free[0])
            taken.append(free[0])
        return found

    def _bundles(self, samples: int, num_microbatches: int) -> list[Bundle]:
        """Of all modules beside the backbone: together on each number of ranks, and each on its own."""
        nothing = Bundle(num_ranks=0, busy_s=0.0, fill_s=0.0, bytes=0.0, bytes_per_stage=0.0, choices=())
        fronts = [self._front(module.name, samples, num_microbatches) for module in self._others]
        if not fronts:
            return [nothing]
        together: list[Bundle] = []
        for size in sorted(set.intersection(*(set(front) for front in fronts))):
            found = fronts[0][size]
            for front in fronts[1:]:
                found = _leading([_on_the_same(a, b) for a, b in product(found, front[size])], _BUNDLES)
            together += found
        if len(fronts) == 1:
            return together
        apart = _few_of_each(fronts[0])
        for front in fronts[1:]:
            pairs: dict[int, list[Bundle]] = {}
            for a, b in product(apart, _few_of_each(front)):
                if a.num_ranks + b.num_ranks < self._space.cluster.num_ranks:
                    pairs.setdefault(a.num_ranks + b.num_ranks, []).append(_beside(a, b))
            apart = [each for size in sorted(pairs) for each in _leading(pairs[size], 2)]
        return together + apart

    def leading_rows(self, name: str, samples: int, num_microbatches: int) -> Mapping[int, list[Row]]:
        """By number of ranks, the leading ways to lay out a module beside the backbone."""
        front = self._front(name, samples, num_microbatches)
        return {size: [bundle.choices[0][0].row for bundle in bundles] for size, bundles in front.items()}

    def _front(self, name: str, samples: int, num_microbatches: int) -> Mapping[int, list[Bundle]]:
        key = name, samples, num_microbatches
        if key not in self._fronts:
            self._fronts[key] = self._make_front(*key)
        return self._fronts[key]

    def _make_front(self, name: str, samples: int, num_microbatches: int) -> Mapping[int, list[Bundle]]:
        options, space = self.options[name], self._space
        found: dict[int, list[Bundle]] = {}
        chosen = np.arange(len(options.rows))
        if not len(chosen):
            return found
        items = samples * options.module.items_per_sample
        for unit in space.units(options.module, num_microbatches, min(_USUAL_PP, num_microbatches)):
            count = np.ceil(items * unit / options.dp - 1e-9).astype(np.int64)
            unit_s, held, live = options.costs(chosen, np.maximum(count, 1))
            num_units = -(-num_microbatches // unit)
            busy = num_units * unit_s + options.tail_s
            ahead = (options.pp - 1) / unit + 1 + (unit > 1)
            all_live = ahead + _USUAL_PP / unit >= num_units
            always = held + live * np.where(all_live, num_units, ahead)
            by_stage = np.where(all_live, 0.0, live / unit)
            for size in np.unique(options.num_ranks).tolist():
                at = np.flatnonzero((options.num_ranks == size) & np.isfinite(busy))
                for i in _front_of(busy[at] + options.pp[at] * unit_s[at], (always + _USUAL_PP * by_stage)[at]):
                    row = at[i]
                    found.setdefault(size, []).append(
                        Bundle(
                            num_ranks=size,
                            busy_s=float(busy[row]),
                            fill_s=float(options.pp[row] * unit_s[row]),
                            bytes=float(always[row]),
                            bytes_per_stage=float(by_stage[row]),
                            choices=((Choice(name, options.rows[row], unit),),),
                        )
                    )
        return {size: _leading(bundles, _FRONT) for size, bundles in found.items()}


def has_schedule(space: Space, plan: Plan) -> bool:
    """Whether pins allow the plan under some schedule of it."""
    return any(space.allows(replace(plan, schedule=each)) for each in space.schedules(is_chunked(plan.modules)))


def is_chunked(modules: Mapping[str, ModulePlan]) -> bool:
    """Whether a module has virtual stages."""
    return any(placed.layout.vpp > 1 for placed in modules.values())


def _picks(step_s: Floats, size_bytes: Floats, limit: float, keep: int) -> list[int]:
    """Flat positions: the `keep` fastest that fit, and the leanest."""
    flat = np.where(size_bytes <= limit, step_s, math.inf).ravel()
    count = min(keep, flat.size)
    best = np.argpartition(flat, count - 1)[:count]
    found = [int(at) for at in best if math.isfinite(flat[at])]
    leanest = int(np.argmin(size_bytes))
    return found + ([leanest] if math.isfinite(size_bytes.flat[leanest]) and leanest not in found else [])


def _front_of(seconds: Floats, num_bytes: Floats) -> list[int]:
    """Positions of the Pareto front, fastest first."""
    found, least = [], math.inf
    for i in np.lexsort((num_bytes, seconds)).tolist():
        if num_bytes[i] < least:
            found.append(i)
            least = num_bytes[i]
    return found


def _leading(bundles: Sequence[Bundle], count: int) -> list[Bundle]:
    """Of the Pareto front of time and memory, the fastest, and the leanest."""
    front: list[Bundle] = []
    for each in sorted(bundles, key=lambda b: (b.rank, b.usual_bytes)):
        if not front or each.usual_bytes < front[-1].usual_bytes:
            front.append(each)
    return front if len(front) <= count else [*front[: count - 1], front[-1]]


def _few_of_each(front: Mapping[int, list[Bundle]]) -> list[Bundle]:
    """The fastest and the leanest on each number of ranks."""
    return [each for bundles in front.values() for each in dict.fromkeys((bundles[0], bundles[-1]))]


def _on_the_same(a: Bundle, b: Bundle) -> Bundle:
    return Bundle(
        num_ranks=a.num_ranks,
        busy_s=a.busy_s + b.busy_s,
        fill_s=max(a.fill_s, b.fill_s),
        bytes=a.bytes + b.bytes,
        bytes_per_stage=a.bytes_per_stage + b.bytes_per_stage,
        choices=((*a.choices[0], *b.choices[0]),),
    )


def _beside(a: Bundle, b: Bundle) -> Bundle:
    return Bundle(
        num_ranks=a.num_ranks + b.num_ranks,
        busy_s=max(a.busy_s, b.busy_s),
        fill_s=max(a.fill_s, b.fill_s),
        bytes=max(a.bytes, b.bytes),
        bytes_per_stage=max(a.bytes_per_stage, b.bytes_per_stage),
        choices=(*a.choices, *b.choices),
    )
