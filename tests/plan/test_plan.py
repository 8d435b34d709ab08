"""Plans: what the constructors and `validate_plan` accept, and what they say when they refuse."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_mosaic.errors import PlanError
from megatron_mosaic.plan import Layout, ModulePlan, Plan, Quota, RankSet, ScheduleChoice, validate_plan
from megatron_mosaic.plan.validate import MAX_ACTIONS, count_actions, list_empty_replicas
from megatron_mosaic.schedules import build_schedule
from tests.cases import LLM, WORKLOAD, make_cluster, make_plan, plans

EVERYONE = Layout(dp=4)
GOOD = make_plan({"vision": ("0-3", EVERYONE), "llm": ("0-3", Layout(tp=2, pp=2)), "generator": ("2,3", Layout(dp=2))})


@given(st.sets(st.integers(0, 60), min_size=1))
def test_rank_set_text_round_trips(ranks):
    ranks = RankSet.of(ranks)
    assert RankSet.parse(str(ranks)) == ranks


@pytest.mark.parametrize(
    ("text", "ranks"), [("0", (0,)), ("0-3", (0, 1, 2, 3)), ("0-1,4", (0, 1, 4)), (" 1 , 3-4", (1, 3, 4))]
)
def test_rank_set_reads(text, ranks):
    assert RankSet.parse(text).ranks == ranks


@pytest.mark.parametrize("text", ["", "a", "3-1", "0-3,2", "4,1", "0,,1", "-1", "1-", "0 1", "1.5"])
def test_rank_set_refuses(text):
    with pytest.raises(PlanError) as caught:
        RankSet.parse(text)
    assert caught.value.got == repr(text)


@pytest.mark.parametrize("spans", [(), ((2, 3), (0, 1)), ((0, 2), (1, 3)), ((0, 1), (1, 2)), ((-1, 1),), ((3, 3),)])
def test_rank_set_refuses_spans(spans):
    with pytest.raises(PlanError, match="ascending"):
        RankSet(spans)


@given(st.sets(st.integers(0, 40), min_size=1), st.sets(st.integers(0, 40), min_size=1), st.data())
def test_rank_set_is_its_ranks(ranks, others, data):
    """Every answer from spans is the one of a plain sorted list."""
    found, listed = RankSet.of(ranks), sorted(ranks)
    assert (list(found), len(found), found.first, found.last) == (listed, len(listed), listed[0], listed[-1])
    assert found.overlaps(RankSet.of(others)) == bool(ranks & others)
    assert [rank in found for rank in range(42)] == [rank in ranks for rank in range(42)]
    start = data.draw(st.integers(0, len(listed) - 1))
    stop = data.draw(st.integers(start + 1, len(listed)))
    assert list(found.part(start, stop)) == listed[start:stop]
    assert len({found, RankSet.of(listed)}) == 1


@pytest.mark.parametrize("axis", ["tp", "cp", "pp", "vpp", "dp", "ep", "etp"])
def test_layout_refuses_zero(axis):
    with pytest.raises(PlanError, match=rf"layout\.{axis}"):
        Layout(**{axis: 0})


def test_layout_refuses_expert_degrees_that_do_not_fit():
    assert Layout(dp=4, ep=2, etp=2).num_ranks == 4
    with pytest.raises(PlanError, match="divisor of the 4 ranks"):
        Layout(dp=4, pp=2, ep=3)


def test_layout_text():
    assert str(Layout()) == "single"
    assert str(Layout(tp=2, dp=4)) == "tp2 dp4"


@pytest.mark.parametrize("share", [0, -0.1, 1.01])
def test_quota_refuses(share):
    with pytest.raises(PlanError, match="quota"):
        Quota(share=share)


def test_module_plan_refuses_wrong_number_of_ranks():
    with pytest.raises(PlanError) as caught:
        ModulePlan(ranks=RankSet.parse("0-2"), layout=Layout(tp=2, dp=2))
    assert caught.value.expected == "4 ranks for layout tp2 dp2 (tp x cp x pp x dp)"
    assert "3 ranks (0-2)" in caught.value.got


def test_module_plan_refuses_negative_unit():
    with pytest.raises(PlanError, match="unit"):
        ModulePlan(ranks=RankSet.parse("0"), layout=Layout(), unit=-1)


@pytest.mark.parametrize("key", ["world_size", "global_batch_size", "micro_batch_size"])
def test_plan_refuses_zero(key):
    with pytest.raises(PlanError, match=key):
        replace(GOOD, **{key: 0})


def test_plan_refuses_no_modules_and_ranks_outside():
    with pytest.raises(PlanError, match="at least one module"):
        replace(GOOD, modules={})
    with pytest.raises(PlanError) as caught:
        replace(GOOD, world_size=3)
    assert caught.value.where == "modules.vision.ranks"
    assert "raise world_size to 4" in caught.value.fix


def test_modules_on_and_microbatches():
    assert GOOD.modules_on(0) == ("vision", "llm")
    assert GOOD.modules_on(3) == ("vision", "llm", "generator")
    assert GOOD.num_microbatches("llm") == 16


def test_good_plan_is_valid():
    validate_plan(GOOD, WORKLOAD, make_cluster(4))


def _refused(plan: Plan, where: str, expected: str, cluster=None) -> None:
    with pytest.raises(PlanError) as caught:
        validate_plan(plan, WORKLOAD, cluster)
    assert caught.value.where == where
    assert expected in caught.value.expected
    assert caught.value.fix


def test_validate_refuses_another_workload():
    _refused(replace(GOOD, workload="other"), "workload", "toy")
    _refused(replace(GOOD, digest="0" * 12), "digest", WORKLOAD.digest)
    validate_plan(replace(GOOD, digest=""), WORKLOAD)


def test_validate_refuses_unknown_and_missing_modules():
    _refused(
        replace(GOOD, modules={**GOOD.modules, "audio": GOOD.modules["llm"]}),
        "modules.audio",
        "one of ['vision', 'llm'",
    )
    _refused(replace(GOOD, modules={"llm": GOOD.modules["llm"]}), "modules", "an entry for 'vision'")


@pytest.mark.parametrize(
    ("layout", "axis", "size"),
    [
        (Layout(tp=8), "tp", "num_heads 4"),
        (Layout(pp=8), "pp", "num_layers 4"),
        (Layout(pp=4, vpp=2, dp=2), "pp", "num_layers 4"),
        (Layout(cp=8), "cp", "tokens_per_item 64"),
    ],
)
def test_validate_refuses_degrees_that_do_not_divide(layout, axis, size):
    wide = replace(
        GOOD, world_size=8, modules={**GOOD.modules, "llm": ModulePlan(ranks=RankSet.parse("0-7"), layout=layout)}
    )
    if axis == "cp":
        validate_plan(wide, WORKLOAD)  # 64 tokens: 2 x 8 divides them
        return
    _refused(wide, f"modules.llm.layout.{axis}", size)


def test_validate_refuses_a_vocabulary_that_does_not_divide():
    odd = replace(WORKLOAD, modules=tuple(replace(m, vocab_size=m.vocab_size and 33) for m in WORKLOAD.modules))
    plan = replace(GOOD, digest=odd.digest)
    with pytest.raises(PlanError, match="vocab_size 33"):
        validate_plan(plan, odd)


def test_validate_refuses_batches_that_do_not_divide():
    plan = replace(GOOD, modules={**GOOD.modules, "llm": ModulePlan(ranks=RankSet.parse("0-3"), layout=EVERYONE)})
    validate_plan(plan, WORKLOAD)
    _refused(replace(plan, global_batch_size=18), "global_batch_size", "llm.dp = 4")


def test_validate_refuses_a_step_that_no_memory_holds():
    largest = MAX_ACTIONS // count_actions(replace(GOOD, global_batch_size=1), "llm")
    validate_plan(replace(GOOD, global_batch_size=largest), WORKLOAD)
    _refused(replace(GOOD, global_batch_size=largest + 1), "global_batch_size", f"at most {MAX_ACTIONS}")


def test_validate_refuses_a_smaller_cluster():
    _refused(GOOD, "world_size", "at most the 2 ranks", make_cluster(2))


@given(plans())
def test_generated_plans_are_valid(plan):
    validate_plan(plan, WORKLOAD)
    assert LLM.num_layers % plan.modules["llm"].layout.pp == 0
    lanes = build_schedule(plan, WORKLOAD).lanes.values()
    assert count_actions(plan, "llm") == sum(map(len, lanes))


def test_units_that_leave_replicas_empty_are_named():
    """8 samples of 0.3 drawings are 2.4 for 4 replicas; a unit of 2 microbatches brings 4.8."""
    few = replace(
        WORKLOAD,
        modules=tuple(replace(m, items_per_sample=0.3) if m.name == "generator" else m for m in WORKLOAD.modules),
    )
    modules = {"vision": ("0-3", Layout(dp=4)), "llm": ("0-3", Layout(pp=2, dp=2)), "generator": ("0-3", Layout(dp=4))}
    plan = make_plan(modules, workload=few, global_batch_size=32, micro_batch_size=4)
    assert list_empty_replicas(plan, few) == ()  # nobody has chosen these units
    nested = replace(plan, schedule=ScheduleChoice("nested"))
    assert list_empty_replicas(nested, few) == ()
    short = replace(plan.modules["generator"], unit=1)
    (note,) = list_empty_replicas(replace(plan, modules={**plan.modules, "generator": short}), few)
    assert note.startswith("modules.generator.unit: 1 microbatches bring 2.4 items on average to 4 replicas")
    assert note.endswith("set unit: 2, or lower dp")
    assert list_empty_replicas(replace(plan, modules={"llm": plan.modules["llm"]}), few) == ()
