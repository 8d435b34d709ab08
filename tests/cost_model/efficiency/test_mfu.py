"""MFU and relative throughput against hand counts and a published utilisation."""

from dataclasses import replace

import pytest

from megatron_mosaic.cost_model.effects.counts import count_flops
from megatron_mosaic.cost_model.efficiency.mfu import count_step_flops, estimate_efficiency
from megatron_mosaic.cost_model.hardware.catalogue import local_cluster
from megatron_mosaic.cost_model.hardware.profile import Part
from megatron_mosaic.cost_model.model import CostModel
from megatron_mosaic.cost_model.published.accuracy import PUBLISHED
from megatron_mosaic.cost_model.published.rows import Case, load_rows, try_case
from megatron_mosaic.cost_model.simulate import simulate
from megatron_mosaic.plan import Layout
from tests.cases import BACKBONE_ONLY, WORKLOAD, make_cluster, make_plan, make_profile


def test_flops_of_a_step_are_three_forwards_of_all_modules():
    expected = 0.0
    for module in WORKLOAD.modules:
        forward = module.num_layers * count_flops(module, Part.layer)
        forward += count_flops(module, Part.pre) + count_flops(module, Part.post)
        expected += 3 * forward * module.items_per_sample * WORKLOAD.global_batch_size
    assert count_step_flops(WORKLOAD) == pytest.approx(expected)


def test_frozen_modules_need_fewer_passes():
    def total(**changes):
        module = replace(WORKLOAD.by_name["vision"], **changes)
        backbone = replace(WORKLOAD.backbone, frozen=True)
        return count_step_flops(replace(WORKLOAD, modules=(module, backbone), edges=WORKLOAD.edges[:1]))

    vision, llm = WORKLOAD.by_name["vision"], WORKLOAD.backbone
    batch, items = WORKLOAD.global_batch_size, vision.items_per_sample
    layers = vision.num_layers * count_flops(vision, Part.layer) + count_flops(vision, Part.pre)
    head = count_flops(vision, Part.post)
    backbone = llm.num_layers * count_flops(llm, Part.layer) + count_flops(llm, Part.pre) + count_flops(llm, Part.post)
    # a frozen backbone hands gradients back to a trained encoder; behind a frozen one nothing flows back
    assert total() == pytest.approx(batch * (items * 3 * (layers + head) + 2 * backbone))
    assert total(frozen=True) == pytest.approx(batch * (items * (layers + head) + backbone))
    assert total(frozen=True, trains_projector=True) == pytest.approx(
        batch * (items * (layers + 3 * head) + 2 * backbone)
    )


def test_the_backbone_alone_is_all_of_itself():
    plan = make_plan({"llm": ("0-3", Layout(dp=2, pp=2))}, workload=BACKBONE_ONLY)
    model = CostModel(BACKBONE_ONLY, make_cluster(4))
    step_s = simulate(plan, model).step_s
    found = estimate_efficiency(plan, step_s, model)
    assert found.relative_frac == pytest.approx(1)
    peak = 4 * model.cluster.gpu.flops_per_s
    workload = replace(BACKBONE_ONLY, global_batch_size=plan.global_batch_size)
    assert found.mfu_frac == pytest.approx(count_step_flops(workload) / step_s / peak)


def test_modules_beside_the_backbone_cost_throughput():
    everywhere = ("0-3", Layout(dp=4))
    together, model = make_plan(dict.fromkeys(WORKLOAD.by_name, everywhere)), CostModel(WORKLOAD, make_cluster(4))
    halves = {"vision": ("0-1", Layout(dp=2)), "generator": ("0-1", Layout(dp=2)), "llm": ("2-3", Layout(dp=2))}
    apart = make_plan(halves)
    shared, own = (estimate_efficiency(plan, simulate(plan, model).step_s, model) for plan in (together, apart))
    assert 0 < shared.relative_frac < 1
    assert own.relative_frac < 0.75  # half of the GPUs do vision
    assert "MFU" in str(shared)


def test_utilisation_of_a_published_run():
    # Llama 3 70B on 64 H100, FlagPerf: 36.1 % as they count (the full attention square, 6 x parameters)
    row = next(r for r in load_rows(PUBLISHED / "flagperf.csv") if r["row_id"] == "flagperf-0013")
    case = try_case(row)
    assert isinstance(case, Case), case
    model = CostModel(case.workload, case.cluster, setup=case.setup)
    found = estimate_efficiency(case.plan, case.measured_s, model)
    assert found.mfu_frac == pytest.approx(0.361, rel=0.1)


def test_ranks_that_share_cores_have_one_peak_together():
    profile = make_profile()
    model = CostModel(WORKLOAD, local_cluster(profile, 4), profile)
    plan = make_plan(dict.fromkeys(WORKLOAD.by_name, ("0-3", Layout(dp=4))))
    step_s = simulate(plan, model).step_s
    found = estimate_efficiency(plan, step_s, model)
    workload = replace(WORKLOAD, global_batch_size=plan.global_batch_size)
    assert found.mfu_frac == pytest.approx(count_step_flops(workload) / step_s / profile.machine.flops_per_s)
    assert 0 < found.relative_frac < 1
