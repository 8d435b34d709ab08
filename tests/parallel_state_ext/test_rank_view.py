"""What one rank sees of a plan: by hand for one plan, and what holds between the ranks of any."""

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from megatron_mosaic.parallel_state_ext.boundaries.edge_end import EdgeEnd
from megatron_mosaic.parallel_state_ext.group_list import FIELDS, field_groups
from megatron_mosaic.parallel_state_ext.rank_view import ModuleView, Neighbour, RankView
from megatron_mosaic.plan import Layout
from megatron_mosaic.plan.layout import Coordinates, rank_at
from tests.cases import EDGES, make_plan
from tests.worlds import plans, workloads

PLAN = make_plan(
    {"vision": ("0-2", Layout(dp=3)), "llm": ("1-4", Layout(tp=2, pp=2)), "generator": ("4", Layout())}, world_size=6
)
INTO_LLM, FROM_LLM = EDGES


def test_a_small_plan_by_hand() -> None:
    """The llm's stages are ranks 1 2 and 3 4; rank 4 makes images besides, rank 5 idles."""
    view = RankView.of(PLAN, 4, EDGES)
    assert list(view.modules) == ["llm", "generator"]
    llm, generator = view.modules.values()
    assert (llm.at, generator.at) == (Coordinates(tp=1, cp=0, dp=0, pp=1), Coordinates(tp=0, cp=0, dp=0, pp=0))
    assert (llm.groups["pp"], llm.groups["tp"], llm.groups["dp"]) == ((2, 4), (3, 4), (4,))
    assert llm.neighbours == {-1: Neighbour(rank=2, wraps=False)}
    assert (llm.imports, llm.exports) == ((), (EdgeEnd.source_of(FROM_LLM),))
    assert (generator.imports, generator.exports, generator.neighbours) == ((EdgeEnd.target_of(FROM_LLM),), (), {})
    assert RankView.of(PLAN, 2, EDGES).modules["llm"].imports == (EdgeEnd.target_of(INTO_LLM),)
    assert RankView.of(PLAN, 5, EDGES).modules == {}


def test_virtual_stages_have_neighbours_around_the_ring() -> None:
    ring = make_plan({"llm": ("0-3", Layout(pp=4, vpp=2))})
    first, last = (RankView.of(ring, rank).modules["llm"] for rank in (0, 3))
    assert first.neighbours == {+1: Neighbour(rank=1, wraps=False), -1: Neighbour(rank=3, wraps=True)}
    assert last.neighbours == {+1: Neighbour(rank=0, wraps=True), -1: Neighbour(rank=2, wraps=False)}
    assert [(first.is_first(chunk), last.is_last(chunk)) for chunk in first.chunks] == [(True, False), (False, True)]
    assert not any(last.is_first(chunk) or first.is_last(chunk) for chunk in first.chunks)


@given(workloads().flatmap(lambda workload: st.tuples(st.just(workload), plans(workload))))
def test_ranks_agree_on_who_is_where(case) -> None:
    workload, plan = case
    views = [RankView.of(plan, rank, workload.edges) for rank in range(plan.world_size)]
    for name, placed in plan.modules.items():
        of_rank: dict[int, ModuleView] = {view.rank: view.modules[name] for view in views if name in view.modules}
        assert sorted(of_rank) == list(placed.ranks.ranks)
        for rank, module in of_rank.items():
            at = module.at
            assert rank_at(placed, tp=at.tp, cp=at.cp, dp=at.dp, pp=at.pp) == rank
            assert module.groups == {
                field: next(members for members in field_groups(placed, field) if rank in members) for field in FIELDS
            }
            for step, neighbour in module.neighbours.items():
                there = of_rank[neighbour.rank]
                assert there.neighbours[-step].rank == rank
                assert there.at == replace(at, pp=(at.pp + step) % placed.layout.pp)
        first, last = (set(placed.stage_ranks(stage)) for stage in (0, placed.layout.pp - 1))
        for edge in workload.edges:
            arriving = {rank for rank, module in of_rank.items() if EdgeEnd.target_of(edge) in module.imports}
            leaving = {rank for rank, module in of_rank.items() if EdgeEnd.source_of(edge) in module.exports}
            assert arriving == (first if edge.target == name else set())
            assert leaving == (last if edge.source == name else set())


def test_an_end_knows_its_other_end() -> None:
    source, target = EdgeEnd.source_of(INTO_LLM), EdgeEnd.target_of(INTO_LLM)
    assert (source.module, source.opposite, source.is_source) == ("vision", target, True)
    assert (target.module, target.opposite, target.is_source) == ("llm", source, False)
    assert source.in_order(3, 5) == target.in_order(5, 3) == (3, 5)
