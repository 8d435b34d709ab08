"""Process groups of an overlapping plan: right members, no duplicates, nothing left after destroy().

The oracle places a module's ranks in a numpy array [pp, dp, cp, tp] and slices it.
"""

from dataclasses import fields
from datetime import timedelta

import numpy as np
import pytest
import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from torch.distributed import distributed_c10d

from megatron_mosaic.parallel_state_ext.grids import Grids
from megatron_mosaic.parallel_state_ext.rank_view import RankView
from megatron_mosaic.parallel_state_ext.rebound import cpu
from megatron_mosaic.plan import Layout
from tests.cases import EDGES, make_plan
from tests.forked import run_gloo

pytestmark = pytest.mark.dist

PLAN = make_plan(
    {"vision": ("0-2", Layout(dp=3)), "llm": ("0-3", Layout(tp=2, pp=2)), "generator": ("1,3", Layout(tp=2))},
    world_size=5,
)
PAIRS = (("vision", "llm"), ("llm", "generator"))

# Field of ProcessGroupCollection -> the axes along which its members differ (0 pp, 1 dp, 2 cp, 3 tp).
# Without experts (ep = etp = 1) the expert data-parallel group is everybody of a stage.
FIELD_AXES = {
    "tp": (3,),
    "cp": (2,),
    "dp": (1,),
    "pp": (0,),
    "mp": (0, 3),
    "tp_cp": (2, 3),
    "dp_cp": (1, 2),
    "dp_cp_gtp_remat": (1, 2),
    "intra_dp_cp": (1, 2),
    "tp_dp_cp": (1, 2, 3),
    "intra_dist_opt": (0, 1, 2, 3),
    "embd": (),
    "pos_embd": (),
    "gtp_remat": (),
    "expt_gtp_remat": (),
    "ep": (),
    "expt_tp": (),
    "tp_ep": (),
    "tp_ep_pp": (0,),
    "tp_ep_pp_with_egtp_remat": (0,),
    "expt_dp": (1, 2, 3),
    "intra_expt_dp": (1, 2, 3),
    "expt_dp_gtp_remat": (1, 2, 3),
}
# Hierarchical cp, several optimizer instances, FSDP's gathers: refused or not built.
NOT_SET = {"hcp", "inter_dist_opt", "dp_cp_ag", "expt_dp_ag"}


def peers_of(module: str, rank: int, axes: tuple[int, ...]) -> list[int]:
    """The ranks that differ from `rank` along these axes at most."""
    layout = PLAN.modules[module].layout
    grid = np.array(PLAN.modules[module].ranks.ranks).reshape(layout.pp, layout.dp, layout.cp, layout.tp)
    place = np.argwhere(grid == rank)[0]
    return sorted(grid[tuple(slice(None) if axis in axes else place[axis] for axis in range(4))].flatten().tolist())


def ranks_in(group) -> list[int]:
    return sorted(dist.get_process_group_ranks(group))


def check_members() -> None:
    rank = dist.get_rank()
    view = RankView.of(PLAN, rank, EDGES)
    grids = Grids(view, timeout=timedelta(seconds=30))
    assert set(grids.collections) == set(PLAN.modules_on(rank))
    for module, collection in grids.collections.items():
        for field, axes in FIELD_AXES.items():
            assert ranks_in(getattr(collection, field)) == peers_of(module, rank, axes), (module, field)
        for axis in ("tp", "cp", "dp", "pp"):
            assert getattr(collection, axis).rank() == getattr(view.modules[module].at, axis), (module, axis)
        assert collection.ep.rank() == view.modules[module].expert_rank
    for source, target in (*PAIRS, *((b, a) for a, b in PAIRS)):
        ends = {*PLAN.modules[source].ranks.ranks, *PLAN.modules[target].ranks.ranks}
        if rank in ends:
            groups = (*grids.boundary_groups(source, target), *grids.boundary_groups(target, source))
            assert all(ranks_in(group) == sorted(ends) for group in groups)
            assert len(set(map(id, groups))) == 4
    for field in FIELD_AXES:
        assert ranks_in(getattr(grids.alone_view(), field)) == [rank], field
    view = grids.world_view()
    assert ranks_in(view.dp_cp) == [0, 1, 2, 3, 4]
    assert ranks_in(view.pp) == ranks_in(view.tp) == ranks_in(view.mp) == [rank]


def test_collections_have_the_right_members() -> None:
    known = {field.name for field in fields(ProcessGroupCollection)}
    assert set(FIELD_AXES) <= known, "Megatron renamed a group"
    assert known - set(FIELD_AXES) <= NOT_SET, "Megatron has a group that no module is given"
    cpu.install()
    run_gloo(5, check_members)


def check_deduplication() -> None:
    grids = Grids(RankView.of(PLAN, dist.get_rank(), EDGES), timeout=timedelta(seconds=30))
    tuples = {tuple(range(5)), *((rank,) for rank in range(5))}
    for module, placed in PLAN.modules.items():
        tuples |= {tuple(peers_of(module, rank, axes)) for rank in placed.ranks.ranks for axes in FIELD_AXES.values()}
    chains = sum(
        placed.layout.num_ranks // placed.layout.pp for placed in PLAN.modules.values() if placed.layout.pp > 1
    )
    assert grids.num_groups == len(tuples) + 4 * len(PAIRS) + 2 * chains  # four for each edge, a pair for each pipeline
    for collection in grids.collections.values():
        assert collection.dp is collection.dp_cp is collection.intra_dp_cp
        assert collection.cp is collection.embd is grids.alone


def test_every_rank_tuple_has_one_group() -> None:
    cpu.install()
    run_gloo(5, check_deduplication)


def check_destroy() -> None:
    world = distributed_c10d._world

    def sizes() -> list[int]:
        tables = (world.pg_map, world.pg_names, world.pg_group_ranks, world.pg_backend_config, world.pg_to_tag)
        # torch files every group that this rank is not in under one sentinel
        return [len(set(table) - {dist.GroupMember.NON_GROUP_MEMBER}) for table in tables]

    before = sizes()
    for _ in range(2):
        grids = Grids(RankView.of(PLAN, dist.get_rank(), EDGES), timeout=timedelta(seconds=30))
        assert sizes()[0] > before[0]
        grids.destroy()
        assert sizes() == before
        assert grids.num_groups == 0
    one = torch.ones(())
    dist.all_reduce(one)
    assert one.item() == dist.get_world_size(), "the default group is gone too"


def test_destroy_leaves_no_group_behind() -> None:
    cpu.install()
    run_gloo(5, check_destroy)
