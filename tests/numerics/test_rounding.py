"""A gradient that fp32 does not determine: the router of an encoder with one expert a token and a single image.

Its terms add up to 1e-5 of what they are, so two correct runs differ by more than 1e-5 of it.
"""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_mosaic.any2any import definition
from megatron_mosaic.parity.check import check_plan
from megatron_mosaic.parity.verdict import MOST_EXCUSED, TOLERANCE, gradient_error
from megatron_mosaic.plan import Layout
from megatron_mosaic.plan.plan_file import save_plan
from megatron_mosaic.plan.workload import Edge, Role, Workload
from megatron_mosaic.plan.workload_file import format_workload
from megatron_mosaic.runtime import model
from tests.cases import make_plan
from tests.numerics import parity_cases
from tests.worlds import BACKBONE, ITEM_TOKENS, WIDTH, module

ENCODERS = (module("encoder0", Role.encoder), module("encoder1", Role.encoder), module("routed", Role.encoder))
WORKLOAD = Workload(
    name="router",
    modules=(*ENCODERS[:2], replace(ENCODERS[2], num_experts=4, moe_top_k=1), module(BACKBONE, Role.backbone)),
    edges=tuple(Edge(source=e.name, target=BACKBONE, rows_per_item=ITEM_TOKENS, width=WIDTH) for e in ENCODERS),
)
PLAN = make_plan(
    {
        "encoder0": ("0", Layout()),
        "encoder1": ("0", Layout()),
        "routed": ("0-3", Layout(tp=4, ep=2, etp=2)),
        BACKBONE: ("0-3", Layout(tp=2, pp=2)),
    },
    workload=WORKLOAD,
    global_batch_size=1,
)
ROUTED = replace(PLAN.modules["routed"], sequence_parallel=True)
PLAN = replace(PLAN, modules={**PLAN.modules, "routed": ROUTED})
ROUTER, SEED = "block.layers.3.mlp.router.weight", 1058  # norm of the gradient: 1e-5 of its module's


@pytest.fixture
def parity(tmp_path):
    save_plan(PLAN, tmp_path / "plan.yaml")
    (tmp_path / "model.yaml").write_text(format_workload(WORKLOAD))
    words = ["--workload", str(tmp_path / "model.yaml"), "--seed", str(SEED)]
    return lambda: check_plan(str(tmp_path / "plan.yaml"), steps=1, megatron_args=words)


@pytest.mark.dist
def test_a_gradient_that_cancels_is_the_same_but_for_rounding(parity) -> None:
    found = parity()
    assert found.ok, found.as_dict()
    assert f"routed/{ROUTER} in step 0" in found.ill_conditioned, "on this machine it agrees: look for another seed"


@pytest.mark.dist
def test_its_being_wrong_by_a_hundredth_is_still_found(parity, monkeypatch) -> None:
    scale_gradients = model.MosaicModel.scale_gradients

    def wrong(self, factor: float) -> None:
        scale_gradients(self, factor)
        for name, parameter in self.stages["routed"].named_parameters():
            if name.endswith(ROUTER):
                parameter.main_grad *= 1.01

    monkeypatch.setattr(model.MosaicModel, "scale_gradients", wrong)
    found = parity()
    assert not found.ok and found.worst_parameter == f"routed/{ROUTER} in step 0"
    assert found.grad_rel_err_by_module["encoder0"] <= TOLERANCE


@pytest.mark.dist
def test_a_reference_that_does_not_repeat_itself_excuses_nothing(tmp_path, monkeypatch) -> None:
    """Dropout by a way that no table refuses: of each side another one."""
    config_from_args = definition.config_from_args
    monkeypatch.setattr(
        definition, "config_from_args", lambda *args: replace(config_from_args(*args), hidden_dropout=0.1)
    )
    found = check_plan(parity_cases.written(parity_cases.ONE_RANK, tmp_path), steps=1)
    assert not found.ok and found.grad_rel_err_max > 0.1
    assert max(found.unrepeatable.values()) > 0.1 and not found.ill_conditioned
    assert "the reference itself does not repeat" in "\n".join(found.sentences)


@given(st.floats(1e-9, 1e-1), st.floats(1e-9, 1e-1))
def test_what_counts_of_an_error(relative, rounding) -> None:
    """It is an error, and rounding only if it is above the tolerance and no more than 20 roundings and a thousandth."""
    expected = np.array([3.0, 4.0])
    measured, is_rounding = gradient_error(expected * (1 + relative), expected, 5 * rounding)
    assert measured == pytest.approx(relative, rel=1e-6)
    assert is_rounding == (TOLERANCE < measured <= min(MOST_EXCUSED, 20 * rounding))


def test_nothing_excuses_a_nan_or_a_gradient_out_of_nothing() -> None:
    nothing = np.zeros(2, dtype=np.float32)
    assert gradient_error(nothing, nothing, 0.0) == (0.0, False)
    assert gradient_error(nothing + 1e-30, nothing, 0.0) == (math.inf, False)
    assert gradient_error(nothing + np.nan, nothing + 1, 1.0) == (math.inf, False)
    assert gradient_error(nothing + 2, nothing + 1, math.inf) == (1.0, False)
    assert gradient_error(nothing + 1, nothing, 1e-9) == (math.inf, False)
