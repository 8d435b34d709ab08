"""What a frozen module costs, with and without a trained projector."""

from dataclasses import replace

from megatron_mosaic.cost_model.model import CostModel
from megatron_mosaic.plan import Layout
from megatron_mosaic.schedules import Kind
from tests.cases import WORKLOAD, make_cluster, make_plan


def test_frozen_modules_have_no_gradients_and_less_backward():
    frozen = replace(WORKLOAD, modules=tuple(replace(m, frozen=m.name == "llm") for m in WORKLOAD.modules))
    plan = make_plan(
        {"vision": ("0-3", Layout(dp=4)), "llm": ("0-3", Layout(dp=4)), "generator": ("0-3", Layout(dp=4))},
        workload=frozen,
    )
    vision, llm, _ = CostModel(frozen, make_cluster(4)).price(plan).costs
    # no products for weights; elementwise kernels move half as much again
    assert llm.seconds(Kind.F) < llm.seconds(Kind.B) < 2 * llm.seconds(Kind.F)
    assert llm.gradients_s == llm.updated_parameters == 0
    assert vision.gradients_s > 0


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
    (first, last, *_), (_, whole_last, *_) = model.price(plan).costs, whole.price(plan).costs
    assert (first.updated_parameters, last.updated_parameters) == (0, projector)
    assert last.memory.static.optimizer == 12 * projector
    assert first.seconds(Kind.B) == 0 < last.seconds(Kind.B) < 0.1 * whole_last.seconds(Kind.B)
