"""A check that cannot fail proves nothing: runtimes broken on purpose, and what the check says of each.

Ranks are forked from this process, so a patch made here is what they run.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch.distributed as dist

from megatron_mosaic.errors import RankFailure
from megatron_mosaic.parallel_state_ext.boundaries.step_map import StepMap
from megatron_mosaic.parallel_state_ext.rebound import guard
from megatron_mosaic.parity.check import check_plan
from megatron_mosaic.parity.verdict import TOLERANCE
from megatron_mosaic.runtime import model, step, train
from tests.numerics import parity_cases as cases
from tests.numerics.parity_cases import written

pytestmark = pytest.mark.dist


@pytest.fixture
def parity_of_two_ranks(tmp_path):
    """Several images in every message, so that there is something to mix up."""
    plan = replace(cases.TWO_RANKS, micro_batch_size=8, global_batch_size=8)
    return lambda steps=1: check_plan(written(plan, tmp_path), steps=steps)


def assert_only_these_fail(parity, *modules) -> None:
    errors = parity.grad_rel_err_by_module
    assert not parity.ok
    assert {name for name, error in errors.items() if error > TOLERANCE} == set(modules), errors
    assert parity.worst_parameter.partition("/")[0] in modules


def test_the_sound_runtime_passes(parity_of_two_ranks) -> None:
    assert parity_of_two_ranks().ok


def test_gradients_that_are_not_numbers(parity_of_two_ranks, monkeypatch) -> None:
    """`max` over errors must not lose a NaN."""

    def scale_gradients(self, factor: float) -> None:
        for name, stage in self.stages.items():
            stage.scale_gradients(float("nan") if name == "generator" else factor)

    monkeypatch.setattr(model.MosaicModel, "scale_gradients", scale_gradients)
    assert_only_these_fail(parity_of_two_ranks(), "generator")


def test_halved_gradients_of_one_module(parity_of_two_ranks, monkeypatch) -> None:
    def scale_gradients(self, factor: float) -> None:
        for name, stage in self.stages.items():
            stage.scale_gradients(factor / 2 if name == "vision" else factor)

    monkeypatch.setattr(model.MosaicModel, "scale_gradients", scale_gradients)
    parity = parity_of_two_ranks()
    assert_only_these_fail(parity, "vision")
    assert parity.grad_rel_err_by_module["vision"] == pytest.approx(0.5, abs=1e-4)
    assert parity.loss_rel_err <= TOLERANCE


def test_gradients_that_are_not_summed_over_dp(parity_of_two_ranks, monkeypatch) -> None:
    """What a module with dp 2 computes when its ranks do not talk; tp 2 and single ranks do not notice."""
    start, finalize = model.MosaicModel.start_sync, step.finalize_model_grads

    def start_without_dp(self, modules, **kwargs) -> None:
        start(self, [name for name in modules if self.stages_of(name)[0].dp_group.size() == 1], **kwargs)

    def only_without_dp(*args, pg_collection, **kwargs) -> None:
        if pg_collection.dp.size() == 1:
            finalize(*args, pg_collection=pg_collection, **kwargs)

    monkeypatch.setattr(model.MosaicModel, "start_sync", start_without_dp)
    monkeypatch.setattr(step, "finalize_model_grads", only_without_dp)
    assert_only_these_fail(parity_of_two_ranks(), "vision")


def test_two_images_swapped_on_their_way(parity_of_two_ranks, monkeypatch) -> None:
    """The llm reads the wrong picture: its loss is another one, and so are the gradients of both ends.

    In guard mode the first message says so.
    """
    monkeypatch.setenv(guard.VARIABLE, "0")
    sends = StepMap.sends

    def swapped(self, end, unit, peer):
        found = sends(self, end, unit, peer)
        numbers = np.arange(len(self.rows(end, unit)))
        return tuple(replace(part, rows=numbers[part.rows][::-1].copy()) for part in found)

    monkeypatch.setattr(StepMap, "sends", swapped)
    parity = parity_of_two_ranks()
    assert not parity.ok and parity.loss_rel_err > TOLERANCE
    assert {"vision", "llm"} <= {name for name, e in parity.grad_rel_err_by_module.items() if e > TOLERANCE}
    monkeypatch.setenv(guard.VARIABLE, "1")
    with pytest.raises(RankFailure, match=r"a message from rank \d to rank \d") as failure:
        parity_of_two_ranks()
    assert "BatchError" in failure.value.where and "lane llm.0 action llm.0F0" in failure.value.where


def test_weights_that_depend_on_the_rank(parity_of_two_ranks, monkeypatch) -> None:
    """The generator's own weights are other ones: its gradients, its loss and what it sends back to the llm."""
    initialize_by_name = train.initialize_by_name

    def by_rank(stage, module: str, seed: int) -> None:
        initialize_by_name(stage, module, seed + (dist.get_rank() == 1 and module == "generator"))

    monkeypatch.setattr(train, "initialize_by_name", by_rank)
    parity = parity_of_two_ranks()
    assert not parity.ok and parity.loss_rel_err > TOLERANCE
    assert min(parity.grad_rel_err_by_module[name] for name in ("generator", "llm")) > 0.01


def test_clipping_by_a_wrong_norm_shows_in_what_the_first_step_leaves(parity_of_two_ranks, monkeypatch) -> None:
    from megatron_mosaic.parallel_state_ext.optimizers import module_optimizers as optimizer

    clip = optimizer.clip_grad_by_total_norm_fp32
    monkeypatch.setattr(
        optimizer, "clip_grad_by_total_norm_fp32", lambda parameters, limit, norm: clip(parameters, limit, 2 * norm)
    )
    parity = parity_of_two_ranks(steps=1)
    assert parity.grad_rel_err_max <= TOLERANCE  # gradients are compared before they are clipped
    assert not parity.ok and min(parity.parameter_rel_err_by_module.values()) > TOLERANCE, parity.as_dict()


def test_a_replica_that_is_not_stepped_shows_after_the_first_step(parity_of_two_ranks, monkeypatch) -> None:
    """Vision is on both ranks: rank 1 keeps its weights, and no gradient of this step knows."""
    from megatron_mosaic.parallel_state_ext.optimizers.module_optimizers import ModuleOptimizers

    step_all = ModuleOptimizers._step_all

    def without_vision(self):
        kept = {p: p.detach().clone() for p in self.by_module["vision"].get_parameters()}
        stepped = step_all(self)
        if dist.get_rank() == 1:
            for parameter, value in kept.items():
                parameter.data.copy_(value)
        return stepped

    monkeypatch.setattr(ModuleOptimizers, "_step_all", without_vision)
    parity = parity_of_two_ranks(steps=1)
    assert not parity.ok and parity.grad_rel_err_max <= TOLERANCE
    assert parity.worst_replica.endswith("on rank 1")
    assert {name for name, e in parity.parameter_rel_err_by_module.items() if e > TOLERANCE} == {"vision"}
