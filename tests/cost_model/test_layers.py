"""Each stage's own layers, counted by hand and against a walk over the layers."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_mosaic.cost_model.effects.counts import module_parameters
from megatron_mosaic.cost_model.effects.parameters import stage_expert_parameters, stage_parameters
from megatron_mosaic.cost_model.layers import count_layers, split_layers
from megatron_mosaic.cost_model.published.accuracy import PUBLISHED
from megatron_mosaic.cost_model.published.rows import Case, load_rows, try_case
from megatron_mosaic.cost_model.work import list_stage_work
from megatron_mosaic.plan import Layout
from tests.cases import LLM

MIXTURE = replace(LLM, num_experts=4, num_dense_layers=3, dense_ffn_size=512)


@pytest.mark.parametrize(
    ("num_layers", "pieces", "sizes"),
    [
        (8, 4, (2, 2, 2, 2)),
        (126, 128, (0, *[1] * 126, 0)),  # Llama 3.1 405B, pp16 vpp8: embedding and loss stand for a layer each
        (15, 4, (4, 4, 4, 3)),
        (6, 4, (1, 2, 2, 1)),
        (5, 4, (1, 2, 1, 1)),
        (2, 4, (0, 1, 1, 0)),
    ],
)
def test_uneven_layers_leave_room_for_embedding_and_loss(num_layers, pieces, sizes):
    assert split_layers(num_layers, pieces) == sizes


@given(num_layers=st.integers(1, 60), dense=st.integers(0, 60), pp=st.integers(1, 8), vpp=st.integers(1, 4))
def test_stages_have_the_layers_that_a_walk_gives_them(num_layers, dense, pp, vpp):
    vpp = vpp if pp > 1 else 1
    module = replace(MIXTURE, num_layers=num_layers, num_dense_layers=min(dense, num_layers))
    owners = [piece % pp for piece, size in enumerate(split_layers(num_layers, pp * vpp)) for _ in range(size)]
    assert len(owners) == num_layers
    for stage in range(pp):
        mine = [number for number, owner in enumerate(owners) if owner == stage]
        expected = sum(number < module.num_dense_layers for number in mine)
        assert count_layers(module, Layout(pp=pp, vpp=vpp), stage) == (expected, len(mine) - expected)


def test_experts_of_a_stage_are_those_of_its_own_layers():
    # DeepSeek-V3, 256 experts of 3 x 7168 x 2048; of four layers the first is dense: one and two layers of experts
    row = next(r for r in load_rows(PUBLISHED / "simumax_b200.csv") if r["model"].startswith("deepseekv3"))
    case = try_case(row | {"pp": "2", "ep": "4", "gbs": "16"})
    assert isinstance(case, Case), case
    first, second = (lane.work for lane in list_stage_work(case.plan, case.workload, 8).lanes)
    expert = 3 * 7168 * 2048
    assert (first.dense_layers, first.expert_layers, second.expert_layers) == (1, 1, 2)
    assert stage_expert_parameters(first) == 256 / 4 * expert
    assert stage_expert_parameters(second) == 2 * 256 / 4 * expert == pytest.approx(5.64e9, rel=1e-3)


@pytest.mark.parametrize("pp", [1, 2, 3, 5])
def test_no_parameter_is_lost_between_stages(pp):
    module = replace(MIXTURE, num_layers=7, untied_output=True)
    row = load_rows(PUBLISHED / "korthikanti2022_table5.csv")[0]
    case = try_case(row | {"pp": str(pp), "vpp": "1", "tp": "1", "n_gpus": str(pp), "dp": "1"})
    assert isinstance(case, Case), case
    workload = replace(case.workload, modules=(module,))
    lanes = list_stage_work(case.plan, workload, 8).lanes
    assert sum(stage_parameters(lane.work) for lane in lanes) == module_parameters(module)
