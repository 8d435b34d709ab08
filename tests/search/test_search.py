"""The space, the baselines, and the greedy search against brute force on tiny clusters."""

import math
import random
from dataclasses import replace

import pytest

from megatron_mosaic.config import load_task
from megatron_mosaic.cost_model.hardware.catalogue import local_cluster
from megatron_mosaic.cost_model.model import CostModel
from megatron_mosaic.cost_model.simulate import simulate
from megatron_mosaic.errors import ConfigError, ProfileError
from megatron_mosaic.plan import Layout, ModulePlan, Quota, RankSet, Recompute, ScheduleChoice, validate_plan
from megatron_mosaic.plan.workload import Edge, ModuleConfig, Role, Workload
from megatron_mosaic.schedules import SCHEDULES, build_schedule
from megatron_mosaic.search import exhaustive, greedy
from megatron_mosaic.search.baselines import (
    BASELINES,
    best_baseline,
    best_of_schedule,
    homogeneous_plans,
    schedule_plans,
)
from megatron_mosaic.search.evaluate import Evaluator, Verdict
from megatron_mosaic.search.exhaustive import search_exhaustive
from megatron_mosaic.search.find import find_plan
from megatron_mosaic.search.greedy import NoFeasiblePlan, search_greedy
from megatron_mosaic.search.pins import Exclusions, Pins
from megatron_mosaic.search.sketches.compose import Composer, Shape
from megatron_mosaic.search.space import SearchConfig, Space, divisors
from tests.cases import LLM, VISION, WORKLOAD, make_cluster, make_plan, make_profile

TWO = replace(WORKLOAD, modules=(VISION, LLM), edges=WORKLOAD.edges[:1])


def _space(workload=WORKLOAD, num_ranks=4, **config) -> Space:
    return Space(workload=workload, cluster=make_cluster(num_ranks), config=SearchConfig(**config))


def _evaluator(space: Space) -> Evaluator:
    model = CostModel(space.workload, space.cluster)
    return Evaluator(model=model, memory_frac=space.config.memory_frac)


def random_workload(seed: int, num_modules: int = 0) -> Workload:
    """One to three modules of random sizes, in a chain around the backbone."""
    draw = random.Random(seed)
    num_modules = num_modules or draw.choice([1, 2, 2, 2, 3])

    def module(name: str, role: Role) -> ModuleConfig:
        width = draw.choice([128, 512, 2048])
        return ModuleConfig(
            name=name,
            role=role,
            num_layers=draw.choice([2, 4, 6]),
            hidden_size=width,
            num_heads=draw.choice([2, 4, 8]),
            ffn_hidden_size=4 * width,
            tokens_per_item=draw.choice([16, 256, 1024]),
            items_per_sample=1.0 if role is Role.backbone else draw.choice([0.25, 1.0, 4.0]),
        )

    modules = [module("llm", Role.backbone)]
    edges = []
    if num_modules > 1:
        modules.insert(0, module("vision", Role.encoder))
        edges.append(Edge(source="vision", target="llm", rows_per_item=16, width=128))
    if num_modules > 2:
        modules.append(module("generator", Role.generator))
        edges.append(Edge(source="llm", target="generator", rows_per_item=16, width=128))
    return Workload(
        name="random", modules=tuple(modules), edges=tuple(edges), global_batch_size=draw.choice([4, 8, 16])
    )


def test_layouts_by_hand():
    space = _space()
    assert [str(x) for x in space.layouts(LLM, 4)] == ["dp4", "pp2 dp2", "pp4", "tp2 dp2", "tp2 pp2", "tp4"]
    assert [str(x) for x in _space(max_tp=2, max_pp=1).layouts(LLM, 4)] == ["dp4", "tp2 dp2"]
    assert space.layouts(LLM, 3) == ()  # dp 3 does not divide 16 samples, 3 stages do not divide 4 layers
    assert space.layouts(replace(LLM, num_query_groups=2), 4)[-1] == Layout(tp=2, pp=2)
    few = replace(VISION, items_per_sample=0.1)  # 1.6 items a step
    assert all(x.dp == 1 for x in space.layouts(few, 4))


def test_tp_stays_on_a_node():
    space = Space(workload=WORKLOAD, cluster=make_cluster(8, gpus_per_node=2), config=SearchConfig())
    assert max(x.tp for x in space.layouts(LLM, 8)) == 2


def test_rank_sets_are_runs():
    assert [str(r) for r in _space(num_ranks=3).rank_sets(LLM)] == ["0-2", "0-1", "1-2", "0", "1", "2"]
    assert divisors(12) == (1, 2, 3, 4, 6, 12)
    assert divisors(49) == (1, 7, 49)
    sizes = Space(workload=WORKLOAD, cluster=make_cluster(64, gpus_per_node=8), config=SearchConfig()).sizes()
    assert {*sizes} == {1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64}


def test_micro_batches_and_shares():
    assert _space(max_micro_batch_size=4).micro_batch_sizes(2) == (1, 2, 4)
    assert _space().quotas() == (Quota(),)  # the runtime does not put modules beside each other on a GPU yet
    profile = make_profile()
    for num_ranks, shares in ((4, [1.0]), (1, [1.0, 0.5])):  # of the two cores, the part a rank may call its own
        local = Space(workload=WORKLOAD, cluster=local_cluster(profile, num_ranks), config=SearchConfig())
        assert [q.share for q in local.quotas()] == shares


@pytest.mark.parametrize(
    ("key", "value"),
    [("max_tp", 0), ("max_pp", -1), ("max_micro_batch_size", 0), ("memory_frac", 0.0), ("min_gain_frac", 1.0)],
)
def test_config_refuses(key, value):
    with pytest.raises(ConfigError, match=rf"search\.{key}"):
        SearchConfig(**{key: value})


def test_an_exhaustive_search_has_no_time_budget():
    with pytest.raises(ConfigError, match="no best plan so far"):
        SearchConfig(algorithm="exhaustive", time_budget_s=1.0)


def test_baselines_are_what_they_say():
    space = _space()
    for plan in homogeneous_plans(space):
        validate_plan(plan, WORKLOAD, space.cluster)
        build_schedule(plan, WORKLOAD)
        assert len({(m.ranks, m.layout) for m in plan.modules.values()}) == 1
        assert plan.modules["llm"].ranks == RankSet.parse("0-3")


@pytest.mark.parametrize(("workload", "shares"), [(WORKLOAD, {0.25, 0.5}), (TWO, {0.25, 0.5, 0.75})])
def test_spatial_sharing_shares(workload, shares):
    profile = make_profile(workload, cores=4)
    space = Space(workload=workload, cluster=local_cluster(profile, 1), config=SearchConfig())
    evaluator = Evaluator(model=CostModel(workload, space.cluster, profile), memory_frac=1.0)
    plans = [p for p in BASELINES["spatial_sharing"].plans(space, evaluator)]
    assert {m.quota.share for p in plans for m in p.modules.values()} == shares
    assert all(math.fsum(m.quota.share for m in p.modules.values()) == pytest.approx(1) for p in plans)
    best = best_baseline("spatial_sharing", space, evaluator)
    assert best is not None
    assert len(set(build_schedule(best.plan, workload).tracks.values())) == len(workload.modules)


def test_plans_of_a_schedule_obey_pins_and_run():
    words = ["search.pin.llm.layout.pp=2", "search.pin.llm.recompute=full", "search.pin.vision.unit=2"]
    task = load_task(["model=vlm_7b", "cluster=h100_1x8", "workload.global_batch_size=16", *words])
    space = Space(workload=task.workload, cluster=task.cluster, config=task.search)
    for name in SCHEDULES:
        plans = list(schedule_plans(space, name))
        for plan in plans:
            validate_plan(plan, space.workload, space.cluster)
            assert (plan.modules["llm"].layout.pp, plan.modules["llm"].recompute) == (2, Recompute.full)
            assert plan.modules["vision"].unit == 2
            assert plan.modules["llm"].sequence_parallel == (plan.modules["llm"].layout.tp > 1)
        assert plans
    no_nested = replace(space.config, exclude=Exclusions(schedule=frozenset({"nested"})))
    assert not list(schedule_plans(replace(space, config=no_nested), "nested"))


def test_the_best_of_a_schedule_where_nothing_fits_can_run_and_is_the_leanest():
    cluster = make_cluster(4)
    tiny = replace(cluster, gpu=replace(cluster.gpu, memory_bytes=1e5))
    space = Space(workload=WORKLOAD, cluster=tiny, config=SearchConfig())
    evaluator = _evaluator(space)
    found = best_of_schedule("1f1b", space, evaluator)
    assert found is not None
    validate_plan(found.plan, WORKLOAD, tiny)
    assert found.step_s == evaluator.simulate(found.plan).step_s
    least = [evaluator.model.price(plan).lower_bound_bytes for plan in schedule_plans(space, "1f1b")]
    assert evaluator.model.price(found.plan).lower_bound_bytes == min(least)
    bare = replace(space, workload=replace(WORKLOAD, global_batch_size=999_983))  # no plan has few enough actions
    assert best_of_schedule("1f1b", bare, _evaluator(bare)) is None


def test_every_step_is_better_than_the_one_before_and_explained():
    space = _space(random_workload(3))
    evaluator = _evaluator(space)
    steps = list(search_greedy(space, evaluator))
    starts = [i for i, step in enumerate(steps) if step.reason.startswith("start: best ")]
    assert starts[0] == 0
    for i, step in enumerate(steps):
        validate_plan(step.plan, space.workload, space.cluster)
        build_schedule(step.plan, space.workload)
        assert evaluator.simulate(step.plan).step_s == pytest.approx(step.step_s)
        if i not in starts and "the better of the ends" not in step.reason:
            assert step.step_s < steps[i - 1].step_s
            assert "(was " in step.reason
    assert steps[-1].step_s == min(step.step_s for step in steps)


def test_plans_that_differ_only_in_their_schedule_are_two_plans():
    space = _space()
    evaluator = _evaluator(space)
    plan = make_plan({"vision": ("0-3", Layout(dp=4)), "llm": ("0-3", Layout(pp=2, dp=2)),
                      "generator": ("0-3", Layout(dp=4))})  # fmt: skip
    other = replace(plan, schedule=ScheduleChoice("three_phase"))
    assert evaluator.step_s(plan) != evaluator.step_s(other)
    assert evaluator.evaluated == 2
    assert evaluator.step_s(plan) == evaluator.simulate(plan).step_s
    assert evaluator.step_s(other) == evaluator.simulate(other).step_s


def test_modules_beside_each_other_ask_for_no_more_than_their_device():
    profile = make_profile(cores=4)
    space = Space(workload=WORKLOAD, cluster=local_cluster(profile, 1), config=SearchConfig())
    evaluator = Evaluator(model=CostModel(WORKLOAD, space.cluster, profile), memory_frac=1.0)
    plan = make_plan({name: ("0", Layout()) for name in ("vision", "llm", "generator")}, world_size=1)
    for name, vision, llm, runs in (
        ("overlap", 0.75, 0.5, False),
        ("overlap", 0.5, 0.5, True),
        ("1f1b", 0.75, 0.5, True),
    ):
        quotas = {"vision": Quota(share=vision), "llm": Quota(share=llm), "generator": Quota()}
        modules = {m: replace(placed, quota=quotas[m]) for m, placed in plan.modules.items()}
        found = replace(plan, modules=modules, schedule=ScheduleChoice(name))
        assert (evaluator.step_s(found) < math.inf) == runs
    assert evaluator.counts[Verdict.illegal] == 1


def test_when_time_is_over_the_first_start_has_to_do(monkeypatch):
    monkeypatch.setattr(greedy, "best_baseline", lambda *_: pytest.fail("a family is asked though time is over"))
    space = _space(random_workload(3))
    steps = list(search_greedy(space, _evaluator(space), is_over=lambda: True))
    assert [step.reason.split(":")[0] for step in steps] == ["start"]


def test_sketches_are_made_once_for_the_same_pins():
    evaluator = _evaluator(space := _space())
    pinned = replace(space, config=SearchConfig(pin=Pins.model_validate({"llm": {"layout": {"tp": 2}}})))
    sketches = evaluator.composer(space).sketches(3)
    assert evaluator.composer(replace(space)).sketches(3) is sketches
    assert evaluator.composer(space).sketches(4) is not sketches
    assert {s.plan.modules["llm"].layout.tp for s in evaluator.composer(pinned).sketches(3)} == {2}


def test_search_is_deterministic():
    space = _space(random_workload(5, 1), max_micro_batch_size=2)
    assert list(search_greedy(space, _evaluator(space))) == list(search_greedy(space, _evaluator(space)))


def test_never_worse_than_the_best_baseline():
    for seed in (20, 21):
        space = _space(random_workload(seed, 2), 4, max_micro_batch_size=2)
        *_, last = search_greedy(space, _evaluator(space))
        for name in BASELINES:
            if base := best_baseline(name, space, _evaluator(space)):
                assert last.step_s <= base.step_s


def test_memory_limit_is_respected_or_the_answer_is_no():
    roomy = make_cluster(4)
    peak_bytes = find_plan(CostModel(WORKLOAD, roomy), SearchConfig()).simulation.peak_bytes
    tight = replace(roomy, gpu=replace(roomy.gpu, memory_bytes=0.97 * peak_bytes))
    config = SearchConfig(memory_frac=1.0, max_micro_batch_size=2)
    assert find_plan(CostModel(WORKLOAD, tight), config).simulation.peak_bytes <= 0.97 * peak_bytes
    tiny = replace(tight, gpu=replace(tight.gpu, memory_bytes=1e5))
    with pytest.raises(NoFeasiblePlan) as caught:
        find_plan(CostModel(WORKLOAD, tiny), SearchConfig())
    assert "on ranks" in caught.value.got and "workspace" in caught.value.got
    assert caught.value.expected.startswith("at most 90.00 kB")


def test_no_layout_is_an_answer():
    pin = Pins.model_validate({"llm": {"layout": {"tp": 3}}})
    with pytest.raises(NoFeasiblePlan, match="no layout of all modules on 2 ranks"):
        find_plan(CostModel(WORKLOAD, make_cluster(2)), SearchConfig(pin=pin))


def test_steps_of_too_many_actions_are_left_out():
    prime = replace(WORKLOAD, global_batch_size=999_983)  # one micro-batch size, one dp
    with pytest.raises(NoFeasiblePlan, match="more than 262144 actions in a step"):
        find_plan(CostModel(prime, make_cluster(2)), SearchConfig())


def test_local_search_uses_what_the_profile_has():
    profile = make_profile(tps=(1,))  # no tp 2 was measured
    result = find_plan(
        CostModel(WORKLOAD, local_cluster(profile, 4), profile), SearchConfig(max_micro_batch_size=1, max_pp=2)
    )
    assert all(m.layout.tp == 1 for m in result.plan.modules.values())
    assert result.plan.predicted is not None
    assert result.plan.predicted.cost_model == profile.title
    assert result.evaluated > 10
    none = make_profile(tps=())
    with pytest.raises(ProfileError, match="no points"):
        find_plan(CostModel(WORKLOAD, local_cluster(none, 4), none), SearchConfig())


def test_search_takes_a_share_when_threads_scale_badly():
    data = make_profile().model_dump()
    for module in data["modules"].values():
        for threads in module.values():
            for point, alone in zip(threads[2], threads[1], strict=True):  # a second thread does harm
                point |= {key: 1.5 * alone[key] for key in ("forward_s", "backward_s")}
    profile = type(make_profile()).model_validate(data)
    result = find_plan(CostModel(WORKLOAD, local_cluster(profile, 1), profile), SearchConfig())
    assert {m.quota.share for m in result.plan.modules.values()} == {0.5}


def test_exhaustive_refuses_large_spaces(monkeypatch):
    monkeypatch.setattr(exhaustive, "MAX_PLANS", 200)
    space = _space(num_ranks=2, max_micro_batch_size=1)
    with pytest.raises(ConfigError, match="algorithm=greedy"):
        search_exhaustive(space, _evaluator(space))


def test_pins_hold_and_exclusions_too():
    words = ["search.pin.llm.layout.tp=2", "search.pin.vision.ranks=0-3", "search.pin.micro_batch_size=1"]
    words += ["search.exclude.schedule=[1f1b,nested]", "workload.items_per_sample.vision=3"]
    task = load_task(["model=vlm_7b", "cluster=h100_1x8", "workload.global_batch_size=32", *words])
    assert task.workload.by_name["vision"].items_per_sample == 3
    plan = find_plan(task.cost_model(), task.search).plan
    assert (plan.modules["llm"].layout.tp, plan.micro_batch_size) == (2, 1)
    assert plan.modules["vision"].ranks == RankSet.parse("0-3")
    assert plan.schedule.name not in ("1f1b", "nested")


def test_nothing_to_recompute_is_left_where_attention_is_fused():
    words = ["model=vlm_7b", "cluster=h100_1x8", "workload.global_batch_size=8"]
    task = load_task([*words, "search.exclude.recompute=[none,full,whole]"])
    with pytest.raises(NoFeasiblePlan):
        find_plan(task.cost_model(), task.search)


def test_a_module_without_a_backward_recomputes_nothing_whatever_is_excluded():
    frozen = replace(TWO, modules=(replace(VISION, frozen=True), LLM))
    exclude = Exclusions(recompute=frozenset({Recompute.none}))
    plan = find_plan(CostModel(frozen, make_cluster(2)), SearchConfig(exclude=exclude)).plan
    assert plan.modules["vision"].recompute is Recompute.none
    assert plan.modules["llm"].recompute is not Recompute.none


@pytest.mark.parametrize(
    ("pins", "is_possible"),
    [
        ({"vision": "0-3"}, True),
        ({"vision": "2-5"}, True),
        ({"llm": "4-7"}, True),
        ({"vision": "2-5", "llm": "0-1"}, True),
        ({"vision": "0-3", "llm": "2-5"}, False),
    ],
)
def test_disjoint_sketches_keep_off_pinned_ranks(pins, is_possible):
    pin = Pins.model_validate({name: {"ranks": ranks} for name, ranks in pins.items()})
    space = _space(num_ranks=8, pin=pin)
    sketches = Composer(space, CostModel(WORKLOAD, space.cluster)).sketches(50)
    found = [sketch.plan for sketch in sketches if sketch.shape is Shape.disjoint]
    assert bool(found) == is_possible
    for plan in found:
        backbone, others = plan.modules["llm"], [plan.modules[name] for name in ("vision", "generator")]
        assert not any(backbone.ranks.overlaps(other.ranks) for other in others)
        assert others[0].ranks == others[1].ranks or not others[0].ranks.overlaps(others[1].ranks)
        assert all(str(plan.modules[name].ranks) == ranks for name, ranks in pins.items())


@pytest.mark.parametrize(
    ("word", "where"),
    [
        ("search.pin.audio.layout.tp=2", "search.pin.audio"),
        ("search.pin.llm.layout.tq=2", "search.pin.llm.layout.tq"),
        ("search.exclude.schedule=[nest]", "search.exclude.schedule"),
        ("search.exclude.recompute=[none,selective,full,whole]", "search.exclude.recompute"),
        ("search.algorithm=lucky", "search.algorithm"),
    ],
)
def test_refuses_pins_of_nothing(word, where):
    with pytest.raises(ConfigError, match=where.replace(".", r"\.")):
        load_task(["model=vlm_7b", "cluster=h100_1x8", word])


def test_as_good_as_a_plan_by_hand():
    """ViT pp4 dp16 in units of four beside LLaMA pp4 dp16, under 1F1B, on 64 H100."""
    task = load_task(["model=vlm_7b", "cluster=h100_8x8"])
    model = task.cost_model()
    space = Space(workload=task.workload, cluster=task.cluster, config=task.search)
    placed = ModulePlan(ranks=RankSet.block(0, 64), layout=Layout(pp=4, dp=16), unit=1)
    hand = space.make_plan(1, {"vision": replace(placed, unit=4), "llm": placed}, ScheduleChoice("1f1b"))
    found = find_plan(model, task.search)
    assert found.simulation.step_s <= simulate(hand, model).step_s
    assert task.fits(found.simulation.peak_bytes)
