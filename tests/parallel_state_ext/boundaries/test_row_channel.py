"""RowChannels over four gloo ranks: many borders in one world, against plain indexing of the whole tensor.

The oracle is indexing: the row of a token is a function of its source item and position, wherever it travelled. Values
are small integers, so that sums in the adjoint identity are exact.
"""

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megatron_mosaic.parallel_state_ext.boundaries.routes import Part
from megatron_mosaic.parallel_state_ext.boundaries.row_channel import RowChannel
from megatron_mosaic.parallel_state_ext.boundaries.step_map import PlanMap, StepMap
from megatron_mosaic.plan import Layout, ModulePlan, Plan, RankSet
from megatron_mosaic.plan.layout import coordinates_of
from megatron_mosaic.plan.workload import Edge, Role, Workload
from tests.forked import run_gloo
from tests.worlds import BACKBONE, ITEM_TOKENS, WIDTH, bring_items, module

pytestmark = pytest.mark.dist

EDGE = Edge(source="encoder0", target=BACKBONE, rows_per_item=ITEM_TOKENS, width=WIDTH)
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
        schedule="1f1b",
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
    """One border on this rank: rows that it holds on either side, and messages for all units."""

    def __init__(self, number: int, plan: Plan) -> None:
        self.plan, self.rank = plan, dist.get_rank()
        rng = np.random.default_rng(number)
        size = plan.micro_batch_size * plan.modules[BACKBONE].layout.dp
        metadata = [bring_items(WORKLOAD, size, rng) for _ in range(4)]
        self.map = StepMap(PlanMap(plan, WORKLOAD, self.rank), metadata)

    def units(self, *, at_source: bool) -> range:
        name = EDGE.source if at_source else EDGE.target
        return (
            range(-(-4 // (self.plan.modules[name].unit or 1))) if name in self.plan.modules_on(self.rank) else range(0)
        )

    def values(self, unit: int, seed: int, *, at_source: bool) -> torch.Tensor:
        """Rows of this rank: small integers that depend on where the row is in the unit on the *source* side."""
        rows = self.map.rows(EDGE, unit, at_source=at_source)
        generator = torch.Generator().manual_seed(1000 * seed + unit)
        table = torch.randint(-9, 10, (64, 64, WIDTH), generator=generator).float()
        name = EDGE.source if at_source else EDGE.target
        shard = self.map.shard(name, unit)
        items = torch.tensor([shard.items[i] for i in rows.items], dtype=torch.long)
        return table[items, torch.as_tensor(shard.tokens[rows.tokens])]

    def carry(self, channel: RowChannel, rows: dict[int, torch.Tensor], *, forward: bool) -> dict[int, torch.Tensor]:
        """Send these rows by unit; what this rank gets on the other side."""
        for unit, values in rows.items():
            for peer in self.map.peers(EDGE, unit, at_source=forward):
                if len(values):
                    channel.send((unit, peer), self.map.sends(EDGE, unit, peer, at_source=forward), values)
        got = {}
        for unit in self.units(at_source=not forward):
            held = self.map.rows(EDGE, unit, at_source=not forward)
            if held:
                arrivals = [
                    ((peer, unit), self.map.receives(EDGE, unit, peer, at_source=not forward))
                    for peer in self.map.peers(EDGE, unit, at_source=not forward)
                ]
                got[unit] = channel.receive(arrivals, len(held))
        channel.drain()
        return got

    def counts(self, *, at_source: bool) -> bool:
        """Whether this rank speaks for its replicas."""
        name = EDGE.source if at_source else EDGE.target
        module_plan = self.plan.modules[name]
        return module_plan.sequence_parallel or coordinates_of(module_plan, self.rank).tp == 0


def check_all_borders() -> None:
    forward, backward = make_channel(), make_channel()
    for number, (name, sides) in enumerate(BORDERS.items()):
        border = Border(number, make_plan(*sides))
        x = {unit: border.values(unit, number, at_source=True) for unit in border.units(at_source=True)}
        y = {unit: border.values(unit, 99 - number, at_source=False) for unit in border.units(at_source=False)}
        before = forward.sent_bytes
        ax, aty = border.carry(forward, x, forward=True), border.carry(backward, y, forward=False)
        left = sum(float((rows * y[u]).double().sum()) for u, rows in ax.items() if border.counts(at_source=False))
        right = sum(float((rows * x[u]).double().sum()) for u, rows in aty.items() if border.counts(at_source=True))
        left, right = summed(left), summed(right)
        assert left == right, f"{name}: <Ax, y> = {left}, <x, A^T y> = {right}"
        assert left, f"{name}: a test of zeros"
        assert all(len(rows) == len(border.map.rows(EDGE, u, at_source=False)) for u, rows in ax.items())
        if sides[0][0] == sides[1][0] and set(sides[0][1]) == {"tp"}:
            # every rank holds every row: what it needs is a part of what it has
            assert summed(forward.sent_bytes - before) == 0, name


def test_rows_arrive_where_indexing_says_and_backward_is_the_adjoint() -> None:
    run_gloo(4, check_all_borders)


def keep_rows() -> None:
    channel, rows = make_channel(), torch.arange(12.0).view(3, 4)
    everything = (Part(dist.get_rank(), slice(0, 3), 3),)
    channel.send("unit 3", everything, rows)
    assert channel.receive([("unit 3", everything)], 3).data_ptr() == rows.data_ptr(), "a copy where none is needed"
    channel.send("unit 4", everything, rows)
    with pytest.raises(AssertionError, match="unit 4"):
        channel.drain()


def test_rows_that_stay_are_not_copied_and_rows_that_nobody_takes_are_an_error() -> None:
    run_gloo(1, keep_rows)


def use_buffers_again() -> None:
    """Some rows travel through a staging buffer each way; a later message finds it free, and no size has its own."""
    rank = dist.get_rank()
    channel = RowChannel((dist.new_group(), dist.new_group()), width=2, dtype=torch.float32, device=torch.device("cpu"))
    rows = torch.arange(32.0).view(16, 2)
    for turn, count in enumerate([2, 2, 5, 3, 8, 4]):
        picked = np.arange(count) * 2
        if rank == 0:
            channel.send(turn, (Part(1, picked, count),), rows + turn)
            channel.drain()
        else:
            got = channel.receive([(turn, (Part(0, picked + 1, count),))], 16)
            torch.testing.assert_close(got[picked + 1], (rows + turn)[picked], rtol=0, atol=0)
    assert channel.staging_bytes == 8 * 2 * 4, "one buffer, of the largest message"


def test_staging_buffers_are_used_again() -> None:
    run_gloo(2, use_buffers_again)
