"""Families of plans for several tasks: Spindle, and what it is compared with, on the same MetaOps and prices."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from megatron_mosaic.plan import RankSet
from megatron_mosaic.plan.tasks.waves import Slice, Waves
from megatron_mosaic.search.spindle.metaops import MetaOp
from megatron_mosaic.search.spindle.placement import KEEPING, Placer, Rule
from megatron_mosaic.search.spindle.wavefront import STRATEGIES, Part, Wave, schedule_levels

type Ops = Sequence[MetaOp]


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """Who plans so, and the plans."""

    source: str
    plans: Callable[[Ops, Placer], Iterator[Waves | None]]


def spindle_waves(ops: Ops, placer: Placer) -> Iterator[Waves | None]:
    """Every strategy of the wavefront, placed by every rule that keeps rows where they are."""
    for waves in dict.fromkeys(schedule_levels(ops, placer.num_ranks, each).waves for each in STRATEGIES):
        for rule in KEEPING:
            yield placer.place(waves, rule)


def modules_in_turn(ops: Ops, placer: Placer) -> Iterator[Waves | None]:
    """One module of one task after the other, each on as many devices as make it fastest."""
    waves = [(_whole(op, placer.num_ranks),) for op in ops]
    yield placer.place(waves, Rule.in_turn)


def tasks_in_turn(ops: Ops, placer: Placer) -> Iterator[Waves | None]:
    """One task after the other; inside it devices are shared out to its modules, as well as Spindle does."""
    waves: list[Wave] = []
    for name in dict.fromkeys(op.task for op in ops):
        mine = [op for op in ops if op.task == name]
        found = [schedule_levels(mine, placer.num_ranks, each) for each in STRATEGIES]
        waves += min(found, key=lambda levels: levels.seconds).waves
    for rule in KEEPING:
        yield placer.place(waves, rule)


def marginal_gain(ops: Ops, placer: Placer) -> Iterator[Waves | None]:
    """Tasks beside each other on devices of their own; the next devices go where they save most time for each:
    (T(n) - T(n')) / (n' - n). Inside a task one module after the other. More tasks than devices take turns. None where
    a task's tp and layouts have no common number of devices."""
    tasks = [[op for op in ops if op.task == name] for name in dict.fromkeys(op.task for op in ops)]
    if max(map(_least, tasks)) > placer.num_ranks:
        yield None
        return
    waves: list[tuple[Slice, ...]] = []
    for turn in _turns(tasks, placer.num_ranks):
        counts = _share_out(turn, placer.num_ranks)
        order = sorted(range(len(turn)), key=lambda i: -_tp(turn[i]))  # so that each begins at a multiple of its tp
        first, placed = 0, dict[MetaOp, Slice]()
        for i in order:
            for op in turn[i]:
                part = _whole(op, counts[i])
                placed[op] = placer.slice_of(part, RankSet.block(first, part.count))
            first += counts[i]
        longest = max(map(len, turn))
        waves += [tuple(placed[task[k]] for task in turn if k < len(task)) for k in range(longest)]
    yield tuple(waves)


def _whole(op: MetaOp, num_devices: int) -> Part:
    return Part(op=op, first_layer=0, num_layers=op.num_layers, count=op.curve.most_within(num_devices))


def _least(task: Ops) -> int:
    """Devices that every module of a task can run on: whole groups of its largest tp."""
    return -(-max(op.curve.counts[0] for op in task) // _tp(task)) * _tp(task)


def _tp(task: Ops) -> int:
    """The largest; all are powers of two."""
    return max(op.tp for op in task)


def _task_s(task: Ops, num_devices: int) -> float:
    return sum(op.seconds(op.curve.most_within(num_devices)) for op in task)


def _turns(tasks: Sequence[Ops], num_devices: int) -> list[list[Ops]]:
    """As few as devices allow; tasks of like length together."""
    turns: list[list[Ops]] = [[]]
    for task in sorted(tasks, key=lambda each: -_task_s(each, _least(each))):
        if sum(map(_least, turns[-1])) + _least(task) > num_devices:
            turns.append([])
        turns[-1].append(task)
    return turns


def _share_out(tasks: Sequence[Ops], num_devices: int) -> list[int]:
    counts = [_least(task) for task in tasks]
    while True:
        spare, best = num_devices - sum(counts), (0.0, -1, 0)
        for i, task in enumerate(tasks):
            step = _tp(task)
            for more in range(counts[i] + step, counts[i] + spare + 1, step):
                gain_s = (_task_s(task, counts[i]) - _task_s(task, more)) / (more - counts[i])
                best = max(best, (gain_s, i, more))
        if best[0] <= 0:
            return counts
        counts[best[1]] = best[2]


FAMILIES: dict[str, Family] = {
    "spindle": Family(
        source="Spindle (arXiv 2409.03365): waves of slices on devices of their own", plans=spindle_waves
    ),
    "modules_in_turn": Family(
        source="Megatron-LM, DeepSpeed: sub-models in turn on all devices", plans=modules_in_turn
    ),
    "tasks_in_turn": Family(
        source="DistMM-MT: tasks in turn, modules of a task beside each other", plans=tasks_in_turn
    ),
    "marginal_gain": Family(source="Spindle-Optimus: devices to tasks by marginal gain", plans=marginal_gain),
}
