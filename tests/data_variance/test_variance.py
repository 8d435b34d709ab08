"""Drawn steps against the simulator where nothing varies, closed forms where one thing does, hand counts of balance."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings

from megatron_mosaic.cli.main import main
from megatron_mosaic.cost_model.hardware.catalogue import local_cluster
from megatron_mosaic.cost_model.model import CostModel
from megatron_mosaic.cost_model.simulate import simulate
from megatron_mosaic.data_variance.draw import draw_batch, varies
from megatron_mosaic.data_variance.drawn_step import StepsOfPlan
from megatron_mosaic.data_variance.variance import Spread, estimate_variance
from megatron_mosaic.errors import ConfigError, ProfileError
from megatron_mosaic.parallel_state_ext.boundaries.items import Items
from megatron_mosaic.plan import Layout, ScheduleChoice
from megatron_mosaic.plan.tasks.histogram import Histogram
from megatron_mosaic.plan.workload import Workload
from tests.cases import EDGES, LLM, VISION, WORKLOAD, make_cluster, make_plan, make_profile, plans

EQUAL = np.random.default_rng(0)


def _with_images(vision=VISION, *, items=None, tokens=None, llm=LLM, batch=8) -> Workload:
    changes = {}
    if items:
        found = Histogram.of(items)
        changes |= {"items_histogram": found, "items_per_sample": found.mean}
    if tokens:
        found = Histogram.of(tokens)
        changes |= {"tokens_histogram": found, "tokens_per_item": round(found.mean)}
    modules = (replace(vision, **changes), llm)
    return Workload(name="toy", modules=modules, edges=EDGES[:1], global_batch_size=batch)


def _images(*counts: int, tokens: int = 16) -> dict[str, Items]:
    """A microbatch of samples with so many images each."""
    samples = np.arange(len(counts))
    whose = samples.repeat(counts)
    return {
        "vision": Items(samples=whose, tokens=np.full(len(whose), tokens)),
        "llm": Items(samples=samples, tokens=np.full(len(samples), 64)),
    }


def _at_mean(plan, workload, items: float, tokens: int = 16):
    """The simulator's own step where every sample has so many images of so many tokens."""
    vision = replace(VISION, items_per_sample=items, tokens_per_item=tokens)
    return simulate(plan, CostModel(replace(workload, modules=(vision, *workload.modules[1:])), make_cluster(2)))


@settings(max_examples=40, deadline=None)
@given(plans())
def test_where_nothing_varies_a_drawn_step_is_the_simulated_one(plan):
    model = CostModel(WORKLOAD, make_cluster(4))
    steps, simulated = StepsOfPlan(plan, model), simulate(plan, model)
    drawn = steps.simulate(draw_batch(WORKLOAD, steps.num_microbatches, steps.samples_each, EQUAL))
    # the simulator rounds items of a slot up, where a batch does not divide
    assert drawn.step_s <= simulated.step_s * (1 + 1e-9)
    assert drawn.peak_bytes <= simulated.peak_bytes * (1 + 1e-9)
    if all(steps.samples_each % placed.layout.dp == 0 for placed in plan.modules.values()):
        assert drawn.step_s == pytest.approx(simulated.step_s, rel=1e-9)
        assert drawn.peak_bytes == pytest.approx(simulated.peak_bytes, rel=1e-9)


def test_one_sample_of_one_or_three_images_is_one_of_two_steps():
    workload = _with_images(items={1: 3, 3: 1}, batch=1)
    plan = make_plan(
        {"vision": ("0", Layout()), "llm": ("0", Layout())}, workload=workload, world_size=1, global_batch_size=1
    )
    few, many = _at_mean(plan, workload, 1), _at_mean(plan, workload, 3)
    found = estimate_variance(plan, CostModel(workload, make_cluster(1)), num_batches=400)
    assert found.step_s.p95 == found.step_s.worst == pytest.approx(many.step_s, rel=1e-9)  # a quarter of the batches
    assert found.peak_bytes.worst == pytest.approx(many.peak_bytes, rel=1e-9)
    share = (found.step_s.mean - few.step_s) / (many.step_s - few.step_s)
    assert share == pytest.approx(0.25, abs=4 * math.sqrt(0.25 * 0.75 / 400))  # four standard deviations


def test_tokens_cost_what_the_simulator_says_of_such_items():
    workload = _with_images(tokens={8: 1, 32: 1}, batch=1)
    plan = make_plan(
        {"vision": ("0", Layout()), "llm": ("0", Layout())}, workload=workload, world_size=1, global_batch_size=1
    )
    found = estimate_variance(plan, CostModel(workload, make_cluster(1)), num_batches=16)
    # 1e-5: the simulator's images of 32 tokens also have positions of their own to train
    short, long = (_at_mean(plan, workload, 1, tokens=tokens).step_s for tokens in (8, 32))
    assert found.step_s.worst == pytest.approx(long, rel=1e-5)
    assert long > 1.01 * short


def test_images_of_one_slot_are_padded_to_its_longest():
    workload = _with_images(tokens={8: 1, 32: 1}, batch=1)
    plan = make_plan(
        {"vision": ("0", Layout()), "llm": ("0", Layout())}, workload=workload, world_size=1, global_batch_size=1
    )
    steps = StepsOfPlan(plan, CostModel(workload, make_cluster(1)))
    mixed = _images(2) | {"vision": Items(samples=np.array([0, 0]), tokens=np.array([8, 32]))}
    assert steps.simulate((mixed,)) == steps.simulate((_images(2, tokens=32),))


def _two_replicas(workload):
    placed = ("0-1", Layout(dp=2))
    return make_plan(
        {"vision": placed, "llm": placed}, workload=workload, world_size=2, global_batch_size=workload.global_batch_size
    )


def test_what_the_balancer_evens_out_costs_nothing():
    """Two images on one replica's sample, none on the other's: one moves, and both replicas compute one."""
    workload = _with_images(items={0: 1, 2: 1}, batch=2)
    plan = _two_replicas(workload)
    drawn = StepsOfPlan(plan, CostModel(workload, make_cluster(2))).simulate((_images(2, 0),))
    assert drawn.step_s == pytest.approx(_at_mean(plan, workload, 1).step_s, rel=1e-9)
    assert drawn.imbalance == {"vision": 1.0, "llm": 1.0}


def test_a_unit_of_experts_that_nobody_has_items_for_takes_no_time():
    workload = _with_images(replace(VISION, num_experts=2), items={0: 1, 2: 1}, batch=2)
    modules = {"vision": ("0-1", Layout(dp=2, ep=2)), "llm": ("0-1", Layout(dp=2))}
    plan = make_plan(modules, workload=workload, world_size=2, global_batch_size=2)
    steps = StepsOfPlan(plan, CostModel(workload, make_cluster(2)))
    none, some = steps.simulate((_images(0, 0),)), steps.simulate((_images(1, 0),))
    assert 0 < none.step_s < some.step_s
    assert none.peak_bytes < some.peak_bytes


def test_what_it_leaves_makes_the_step_longer_once_a_replica_and_not_once_a_microbatch():
    """Beside a backbone that is far larger images stay with their samples. Two on the left in one microbatch and on the
    right in the next: each replica computes them once. Two on the left both times: the left one does so twice."""
    workload = _with_images(items={0: 1, 2: 1}, llm=replace(LLM, num_layers=400), batch=4)
    plan = _two_replicas(workload)
    model = CostModel(workload, make_cluster(2))
    steps, one = StepsOfPlan(plan, model), _at_mean(plan, workload, 1)
    of_two = _at_mean(plan, workload, 2).price.costs[0]
    action_of_one, action_of_two = (cost.busy_s / cost.num_actions for cost in (one.price.costs[0], of_two))
    left, right = _images(2, 0), _images(0, 2)
    alternating, same = steps.simulate((left, right)), steps.simulate((left, left))
    assert same.imbalance["vision"] == alternating.imbalance["vision"] == 2.0
    rest_s = one.step_s - 2 * action_of_one
    assert same.step_s == pytest.approx(rest_s + 2 * action_of_two, rel=1e-9)
    assert alternating.step_s == pytest.approx(rest_s + action_of_two, rel=1e-9)


def test_the_same_seed_brings_the_same_samples_however_they_are_cut():
    workload = _with_images(items={0: 1, 1: 5, 4: 2}, tokens={8: 1, 24: 1})
    whole = draw_batch(workload, 1, 8, np.random.default_rng(3))
    cut = draw_batch(workload, 4, 2, np.random.default_rng(3))
    assert [t for batch in cut for t in batch["vision"].tokens] == whole[0]["vision"].tokens.tolist()
    samples = [2 * i + s for i, batch in enumerate(cut) for s in batch["vision"].samples.tolist()]
    assert samples == whole[0]["vision"].samples.tolist()


def test_a_mean_alone_is_kept_by_taking_turns():
    workload = Workload(name="toy", modules=(replace(VISION, items_per_sample=0.75), LLM), edges=EDGES[:1])
    batch = draw_batch(workload, 4, 2, EQUAL)
    assert [len(each["vision"]) for each in batch] == [1, 2, 1, 2]
    assert not varies(workload)


def test_p95_is_one_of_the_drawn():
    assert Spread.of([float(i) for i in range(1, 101)]) == Spread(mean=50.5, p95=95.0, worst=100.0)


def test_lengths_that_were_not_measured_are_refused():
    workload = replace(WORKLOAD, modules=_with_images(tokens={8: 1, 24: 1}).modules + WORKLOAD.modules[2:])
    profile = make_profile(workload)
    plan = make_plan({m.name: ("0", Layout()) for m in workload.modules}, workload=workload, world_size=1)
    with pytest.raises(ProfileError, match="items of one length"):
        StepsOfPlan(plan, CostModel(workload, local_cluster(profile, 1), profile))


def test_no_batch_says_nothing():
    plan = make_plan({m.name: ("0", Layout()) for m in WORKLOAD.modules}, world_size=1)
    with pytest.raises(ConfigError, match="--draws"):
        estimate_variance(plan, CostModel(WORKLOAD, make_cluster(1)), num_batches=-1)


@pytest.mark.parametrize("schedule", ["1f1b", "nested", "three_phase", "overlap"])
def test_every_schedule_is_priced_unit_by_unit(schedule):
    workload = _with_images(items={1: 3, 4: 1}, batch=8)
    plan = make_plan(
        {"vision": ("0-3", Layout(dp=4)), "llm": ("0-3", Layout(pp=2, dp=2))}, workload=workload, global_batch_size=8
    )
    plan = replace(plan, schedule=ScheduleChoice(schedule))
    found = estimate_variance(plan, CostModel(workload, make_cluster(4)), num_batches=16)
    assert found.step_s.mean < found.step_s.p95 <= found.step_s.worst
    assert found.imbalance["vision"] > 1.0 == found.imbalance["llm"]


def test_simulate_says_so(tmp_path, capsys):
    """As a user runs it: a model file with histograms, a plan of it, and --json."""
    model = tmp_path / "own.yaml"
    model.write_text(
        "name: own\nglobal_batch_size: 8\nmodules:\n"
        "  vision: {role: encoder, num_layers: 2, hidden_size: 64, num_heads: 4, ffn_hidden_size: 256,"
        " tokens_per_item: {16: 1, 64: 1}, items_per_sample: {0: 1, 4: 1}, input_size: 4, output_size: 64}\n"
        "  llm: {role: backbone, num_layers: 2, hidden_size: 64, num_heads: 4, ffn_hidden_size: 256,"
        " tokens_per_item: 128, vocab_size: 128, causal: true}\n"
        "edges: [{source: vision, target: llm, rows_per_item: 16, width: 64}]\n"
    )
    plan = tmp_path / "plan.yaml"
    words = [f"model={model}", "cluster=h100_1x8", "search.time_budget_s=5"]
    assert main(["plan", *words, "--out", str(plan)]) == 0
    capsys.readouterr()
    assert main(["simulate", str(plan), f"model={model}", "--draws", "20", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    drawn = result["drawn"]
    assert drawn["batches"] == 20
    assert drawn["step_s"]["p95"] <= drawn["step_s"]["worst"]
    assert drawn["peak_bytes"]["worst"] > drawn["peak_bytes"]["mean"]
    assert main(["simulate", str(plan), f"model={model}", "--draws", "0", "--json"]) == 0
    assert "drawn" not in json.loads(capsys.readouterr().out)
