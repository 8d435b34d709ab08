"""The simulator against the closed form of a step."""

import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_mosaic.cost_model.model import CostModel
from megatron_mosaic.cost_model.published.accuracy import PUBLISHED
from megatron_mosaic.cost_model.published.rows import Case, load_rows, try_case
from megatron_mosaic.cost_model.simulate import simulate
from tests.cost_model.oracle_closed_form import estimate_in_closed_form

ROW = load_rows(PUBLISHED / "mimo_vlm_h100.csv")[0]


def _model(tp: int, pp: int, dp: int, encoder_tp: int, microbatches: int) -> tuple[Case, CostModel]:
    """A 64-layer VLM; its encoder on all ranks."""
    num_gpus = tp * pp * dp
    degrees = {"n_gpus": num_gpus, "tp": tp, "pp": pp, "enc_tp": encoder_tp, "enc_dp": num_gpus // encoder_tp}
    shape = {
        "gbs": dp * microbatches,
        "num_microbatches": microbatches,
        "num_layers": 64,
        "hidden": 8192,
        "heads": 64,
        "kv_heads": 8,
    }
    case = try_case(ROW | {key: str(value) for key, value in (degrees | shape).items()})
    assert isinstance(case, Case), case
    return case, CostModel(case.workload, case.cluster, setup=case.setup)


@given(
    tp=st.sampled_from([1, 2, 8]),
    pp=st.sampled_from([1, 2, 4, 8]),
    dp=st.sampled_from([8, 16, 64]),
    encoder_tp=st.sampled_from([1, 4, 8]),
    microbatches=st.sampled_from([4, 9, 16]),
)
@settings(max_examples=40)
def test_a_pipeline_between_encoders_is_its_closed_form(tp, pp, dp, encoder_tp, microbatches):
    case, model = _model(tp, pp, dp, encoder_tp, microbatches)
    found, simulation = estimate_in_closed_form(case.plan, model), simulate(case.plan, model)
    assert found.step_s == pytest.approx(simulation.step_s, rel=0.02)
    assert found.peak_bytes == pytest.approx(simulation.peak_bytes, rel=0.02)


@given(
    pp=st.sampled_from([1, 2, 4]),
    dp=st.sampled_from([2, 4]),
    encoder_dp=st.sampled_from([2, 4, 8]),
    encoder_pp=st.sampled_from([1, 2, 3]),
    microbatches=st.sampled_from([8, 16]),
)
@settings(max_examples=30)
def test_encoders_apart_are_stages_before_the_first(pp, dp, encoder_dp, encoder_pp, microbatches):
    own = encoder_dp * encoder_pp
    degrees = {"n_gpus": own + 4 * pp * dp, "tp": 4, "pp": pp, "dp": dp, "enc_tp": 1, "enc_dp": encoder_dp}
    shape = {"gbs": dp * microbatches, "num_microbatches": microbatches, "enc_pp": encoder_pp}
    case = try_case(ROW | {key: str(value) for key, value in (degrees | shape).items()})
    assert isinstance(case, Case), case
    vision, llm = case.plan.modules["vision"], case.plan.modules["llm"]
    assert not {*vision.ranks.ranks} & {*llm.ranks.ranks}
    model = CostModel(case.workload, case.cluster)
    found, simulation = estimate_in_closed_form(case.plan, model), simulate(case.plan, model)
    # 10 %: an encoder slower than the backbone lets it wait in ways that no closed form follows
    assert found.step_s == pytest.approx(simulation.step_s, rel=0.1)
    assert found.peak_bytes == pytest.approx(simulation.peak_bytes, rel=0.2)


def test_the_cost_model_needs_neither_torch_nor_megatron_nor_scipy():
    code = "import megatron_mosaic.cost_model.simulate, sys; print(*sys.modules)"
    loaded = subprocess.check_output([sys.executable, "-c", code], text=True).split()
    assert "megatron_mosaic.cost_model.simulate" in loaded
    assert not {"torch", "megatron", "scipy"} & {*loaded}
