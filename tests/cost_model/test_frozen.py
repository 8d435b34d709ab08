"""What a frozen module costs, with and without a trained projector."""

from dataclasses import replace

from megatron_mosaic.cost_model.model import CostModel
from megatron_mosaic.plan import Layout
from tests.cases import WORKLOAD, make_cluster, make_plan


def test_frozen_modules_have_no_gradients_and_less_backward():
    frozen = replace(WORKLOAD, modules=tuple(replace(m, frozen=m.name == "llm") for m in WORKLOAD.modules))
    plan = make_plan(
        {"vision": ("0-3", Layout(dp=4)), "llm": ("0-3", Layout(dp=4)), "generator": ("0-3", Layout(dp=4))},
        workload=frozen,
    )
    model = CostModel(frozen, make_cluster(4))
    forward, backward = (model.action_cost(plan, "llm", 0, backward=b).compute_s for b in (False, True))
    assert forward < backward < 2 * forward  # no products for weights; elementwise kernels move half as much again
    assert model.gradient_sync_s(plan, "llm", 0) == model.trained_parameters(plan, "llm", 0) == 0
    assert model.gradient_sync_s(plan, "vision", 0) > 0


def test_a_trained_projector_costs_its_own_weights_and_no_way_through_the_layers():
    def with_vision(**changes):
        modules = tuple(replace(m, **changes) if m.name == "vision" else m for m in WORKLOAD.modules)
        return CostModel(replace(WORKLOAD, modules=modules), make_cluster(4))

    plan = make_plan(
        {"vision": ("0-3", Layout(pp=2, dp=2)), "llm": ("0-3", Layout(dp=4)), "generator": ("0", Layout())}
    )
    vision = WORKLOAD.by_name["vision"]
    projector = (vision.hidden_size + 1) * vision.output_size
    model, whole = with_vision(frozen=True, trains_projector=True), with_vision()
    assert [model.trained_parameters(plan, "vision", stage) for stage in (0, 1)] == [0, projector]
    assert model.lane_memory(plan, "vision", 1).static.optimizer == 12 * projector
    first, last = (model.action_cost(plan, "vision", stage, backward=True).busy_s for stage in (0, 1))
    assert first == 0 < last < 0.1 * whole.action_cost(plan, "vision", 1, backward=True).busy_s
