"""RowChannels over four gloo ranks: many borders in one world, against plain indexing of the whole tensor.

The oracle is indexing: the row of a token is a function of its source item and position, wherever it travelled. Values
are small integers, so that sums in the adjoint identity are exact.
"""

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megatron_mosaic.parallel_state_ext.boundaries.channels.row_channel import RowChannel
from megatron_mosaic.parallel_state_ext.boundaries.edge_end import EdgeEnd
from megatron_mosaic.parallel_state_ext.boundaries.routes import Part
from megatron_mosaic.parallel_state_ext.boundaries.step_map import PlanMap, StepMap
from megatron_mosaic.parallel_state_ext.rank_view import RankView
from megatron_mosaic.plan import Layout, ModulePlan, Plan, RankSet, ScheduleChoice
from megatron_mosaic.plan.workload import Edge, Role, Workload
from tests.forked import run_gloo
from tests.worlds import BACKBONE, ITEM_TOKENS, WIDTH, bring_items, module

pytestmark = pytest.mark.dist

EDGE = Edge(source="encoder0", target=BACKBONE, rows_per_item=ITEM_TOKENS, width=WIDTH)
SOURCE, TARGET = EdgeEnd.source_of(EDGE), EdgeEnd.target_of(EDGE)
WORKLOAD = Workload(
    name="random", modules=(module("encoder0", Role.encoder), module(BACKBONE, Role.backbone)), edges=(EDGE,)
)
BORDERS = {
    "equal": (("0-3", {"dp": 4}), ("0-3", {"dp": 4})),
    "tp4 to dp4": (("0-3", {"tp": 4}), ("0-3", {"dp": 4})),
    "dp4 to tp2 dp2": (("0-3", {"dp": 4}), ("0-3", {"tp": 2, "dp": 2})),
    "disjoint": (("0-1", {"dp": 2}), ("2-3", {"dp": 2})),
    "disjoint, tp to tp": (("0-1", {"tp": 2}), ("2-3", {"tp": 2})),
    "nested": (("1-2", {"dp": 2}), ("0-3", {"dp": 4})),
    "partial overlap": (("0-2", {"dp": 3}), ("1-3", {"dp": 3})),
    "dp3 to dp2": (("0-2", {"dp": 3}), ("0,3", {"dp": 2})),
    "scattered replicas": (("0,2", {"tp": 2}), ("1,3", {"tp": 2})),
    "one to four replicas": (("2", {}), ("0-3", {"tp": 4})),
    "cp4": (("0-3", {"dp": 4}), ("0-3", {"cp": 4})),
    "cp2 dp2 to cp2 tp2": (("0-3", {"cp": 2, "dp": 2}), ("0-3", {"cp": 2, "tp": 2})),
    "sequence parallel": (("0-3", {"tp": 2, "dp": 2, "sp": True}), ("0-3", {"tp": 2, "cp": 2, "sp": True})),
    "a unit of three": (("0-1", {"dp": 2, "unit": 3}), ("0-3", {"dp": 4})),
}


def placed(ranks: str, settings: dict) -> ModulePlan:
    settings = dict(settings)
    unit, split = settings.pop("unit", 0), settings.pop("sp", False)
    return ModulePlan(ranks=RankSet.parse(ranks), layout=Layout(**settings), unit=unit, sequence_parallel=split)


def make_plan(source, target) -> Plan:
    modules = {"encoder0": placed(*source), BACKBONE: placed(*target)}
    size = 2 * modules[BACKBONE].layout.dp
    return Plan(
        workload="random",
        world_size=4,
        global_batch_size=4 * size,
        micro_batch_size=2,
        schedule=ScheduleChoice("1f1b"),
        modules=modules,
    )


def make_channel() -> RowChannel:
    return RowChannel(
        (dist.new_group(), dist.new_group()), width=WIDTH, dtype=torch.float32, device=torch.device("cpu")
    )


def summed(value: float) -> float:
    total = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(total)
    return float(total)


class Border:
    """One border on this rank: rows that it holds at either end, and messages for all units."""

    def __init__(self, number: int, plan: Plan) -> None:
        self.view = RankView.of(plan, dist.get_rank(), WORKLOAD.edges)
        rng = np.random.default_rng(number)
        size = plan.micro_batch_size * plan.modules[BACKBONE].layout.dp
        metadata = [bring_items(WORKLOAD, size, rng) for _ in range(4)]
        self.map = StepMap(PlanMap(self.view, WORKLOAD), metadata)

    def units(self, end: EdgeEnd) -> range:
        module = self.view.modules.get(end.module)
        return range(-(-4 // (module.placed.unit or 1))) if module else range(0)

    def values(self, end: EdgeEnd, seed: int) -> dict[int, torch.Tensor]:
        """Rows of this rank by unit: small integers that depend on where the row is in the unit at this end."""
        return {unit: self._values_of(end, unit, seed) for unit in self.units(end)}

    def _values_of(self, end: EdgeEnd, unit: int, seed: int) -> torch.Tensor:
        rows, shard = self.map.rows(end, unit), self.map.shard(end.module, unit)
        generator = torch.Generator().manual_seed(1000 * seed + unit)
        table = torch.randint(-9, 10, (64, 64, WIDTH), generator=generator).float()
        items = torch.tensor([shard.items[i] for i in rows.items], dtype=torch.long)
        return table[items, torch.as_tensor(shard.tokens[rows.tokens])]

    def carry(self, channel: RowChannel, sender: EdgeEnd, rows: dict[int, torch.Tensor]) -> dict[int, torch.Tensor]:
        """Send these rows by unit; what this rank gets at the other end."""
        for unit, values in rows.items():
            for peer in self.map.peers(sender, unit):
                if len(values):
                    channel.send((unit, peer), self.map.sends(sender, unit, peer), values)
        got, receiver = {}, sender.opposite
        for unit in self.units(receiver):
            held = self.map.rows(receiver, unit)
            if held:
                arrival = channel.begin(len(held))
                for peer in self.map.peers(receiver, unit):
                    channel.expect(arrival, (peer, unit), self.map.receives(receiver, unit, peer))
                got[unit] = channel.take(arrival)
        channel.drain()
        return got

    def counted(self, end: EdgeEnd, rows: dict[int, torch.Tensor], others: dict[int, torch.Tensor]) -> float:
        """<rows, others> on this rank, if it counts: one of several replicas does."""
        module = self.view.modules.get(end.module)
        if module is None or not (module.placed.sequence_parallel or module.at.tp == 0):
            return 0.0
        return sum(float((values * others[unit]).double().sum()) for unit, values in rows.items())


def check_all_borders() -> None:
    forward, backward = make_channel(), make_channel()
    for number, (name, sides) in enumerate(BORDERS.items()):
        border = Border(number, make_plan(*sides))
        x, y = border.values(SOURCE, number), border.values(TARGET, 99 - number)
        before = forward.sent_bytes
        ax, aty = border.carry(forward, SOURCE, x), border.carry(backward, TARGET, y)
        left, right = border.counted(TARGET, ax, y), border.counted(SOURCE, aty, x)
        left, right = summed(left), summed(right)
        assert left == right, f"{name}: <Ax, y> = {left}, <x, A^T y> = {right}"
        assert left, f"{name}: a test of zeros"
        assert all(len(rows) == len(border.map.rows(TARGET, u)) for u, rows in ax.items())
        if sides[0][0] == sides[1][0] and set(sides[0][1]) == {"tp"}:
            # every rank holds every row: what it needs is a part of what it has
            assert summed(forward.sent_bytes - before) == 0, name


def test_rows_arrive_where_indexing_says_and_backward_is_the_adjoint() -> None:
    run_gloo(4, check_all_borders)


def keep_rows() -> None:
    channel, rows = make_channel(), torch.arange(12.0).view(3, 4)
    everything = (Part(dist.get_rank(), slice(0, 3), 3),)
    channel.send("unit 3", everything, rows)
    arrival = channel.begin(3)
    channel.expect(arrival, "unit 3", everything)
    assert channel.take(arrival).data_ptr() == rows.data_ptr(), "a copy where none is needed"
    channel.send("unit 4", everything, rows)
    with pytest.raises(AssertionError, match="unit 4"):
        channel.drain()


def test_rows_that_stay_are_not_copied_and_rows_that_nobody_takes_are_an_error() -> None:
    run_gloo(1, keep_rows)


def use_buffers_again() -> None:
    """Some rows leave through a staging buffer; a later message finds it free, and no size has its own."""
    rank = dist.get_rank()
    channel = RowChannel((dist.new_group(), dist.new_group()), width=2, dtype=torch.float32, device=torch.device("cpu"))
    rows = torch.arange(32.0).view(16, 2)
    for turn, count in enumerate([2, 2, 5, 3, 8, 4]):
        picked = np.arange(count) * 2
        if rank == 0:
            channel.send(turn, (Part(1, picked, count),), rows + turn)
            channel.drain()
        else:
            arrival = channel.begin(16)
            channel.expect(arrival, turn, (Part(0, picked + 1, count),))
            got = channel.take(arrival)
            torch.testing.assert_close(got[picked + 1], (rows + turn)[picked], rtol=0, atol=0)
    assert channel.staging_bytes == (8 * 2 * 4 if rank == 0 else 0), "one buffer, of the largest message"


def test_staging_buffers_are_used_again() -> None:
    run_gloo(2, use_buffers_again)
