"""Every plan computes what one process computes: each step's losses and every parameter's gradient, to 1e-5.

The oracle is `reference.py`: the undivided modules on one process, plain autograd over the whole global batch, no
boundary, no microbatch, no Megatron optimizer. Two steps, because the second step's gradients see the first's update.
"""

import json
import math
from dataclasses import replace

import pytest

from megatron_mosaic.errors import MosaicError
from megatron_mosaic.launch.forked import run_forked, with_command_line
from megatron_mosaic.parallel_state_ext.rebound import cpu
from megatron_mosaic.parity.check import check_plan
from megatron_mosaic.plan.plan_file import load_plan
from megatron_mosaic.plan.training import Format, Sharding, TrainingSetup
from megatron_mosaic.runtime.train import Runtime
from tests.numerics import parity_cases as cases
from tests.numerics.parity_cases import TEXT_HEAVY, written

pytestmark = pytest.mark.dist

DISTRIBUTED_OPTIMIZER = ["--use-distributed-optimizer"]
CHECKS = [
    pytest.param(cases.SAME_RANKS, [], id="same ranks, dp4 and tp2 dp2"),
    pytest.param(cases.DISJOINT, [], id="disjoint ranks"),
    pytest.param(cases.OVERLAPPING, TEXT_HEAVY, id="nested ranks, dp3 and pp2 dp2, hardly any image"),
    pytest.param(cases.GENERATOR_ELSEWHERE, [], id="generator on other ranks"),
    pytest.param(cases.SCATTERED, DISTRIBUTED_OPTIMIZER, id="scattered ranks, distributed optimizer"),
    pytest.param(cases.OVERLAPPING, [], id="nested ranks, dp3 and pp2 dp2"),
    pytest.param(cases.PIPELINES, [], id="pp4, tp2 pp2, dp3"),
    pytest.param(cases.IDLE_RANK, [], id="a rank without work"),
    pytest.param(cases.SCATTERED, [], id="scattered ranks"),
    pytest.param(cases.TENSOR_TO_TENSOR, [], id="tp4 to tp2 to tp2 pp2"),
    pytest.param(cases.SHARED_PIPELINE, [], id="two pipelines over one pair of ranks"),
    pytest.param(cases.SAME_PIPELINE, [], id="vision and llm pp2 on the same ranks"),
    pytest.param(cases.ONE_RANK, [], id="one rank"),
    pytest.param(cases.SAME_RANKS, TEXT_HEAVY, id="same ranks, hardly any image"),
    pytest.param(cases.OVERLAPPING, DISTRIBUTED_OPTIMIZER, id="nested, distributed optimizer"),
]


@pytest.mark.parametrize(("plan", "megatron_args"), CHECKS)
def test_losses_and_gradients_are_those_of_one_process(plan, megatron_args, tmp_path) -> None:
    parity = check_plan(written(plan, tmp_path), steps=2, megatron_args=megatron_args)
    assert parity.ok, parity.as_dict()
    assert parity.steps == 2 and set(parity.grad_rel_err_by_module) == {"vision", "llm", "generator"}
    # Not by luck: no gradient can be equal in every bit when sums are taken in another order.
    assert plan is cases.ONE_RANK or parity.grad_rel_err_max > 0
    if megatron_args is TEXT_HEAVY:
        assert parity.empty_units_by_module["vision"] > 0, "no rank ever saw a microbatch without an image"
        assert parity.empty_units_by_module["llm"] == 0


ONLY_TEXT = ["--digits-text-only-frac", "0.99", "--digits-two-image-frac", "0.0", "--digits-generate-frac", "0.01"]


@pytest.mark.parametrize("frozen", [[], ["--freeze", "llm", "generator"]], ids=["", "and nothing else is trained"])
def test_a_batch_without_any_image_gives_vision_no_gradient(frozen, tmp_path) -> None:
    """Then both sides agree on zeros (no NaN, no missing parameter, no hang), and that proves nothing of vision."""
    parity = check_plan(written(cases.TWO_RANKS, tmp_path), steps=1, megatron_args=ONLY_TEXT + frozen)
    assert parity.is_same and not parity.ok, parity.as_dict()
    unexercised = ["vision"] if frozen else ["generator", "vision"]
    assert parity.as_dict()["unexercised_modules"] == unexercised
    assert parity.grad_rel_err_by_module["vision"] == 0
    assert parity.empty_units_by_module["vision"] == 2


def test_full_recomputation_saves_bytes_and_changes_no_number(tmp_path) -> None:
    kept = check_plan(written(cases.TWO_RANKS, tmp_path), steps=2)
    again = check_plan(written(cases.recomputed(cases.TWO_RANKS), tmp_path), steps=2)
    assert kept.ok and again.ok, again.as_dict()
    kept_bytes, again_bytes = kept.peak_activation_bytes_by_module, again.peak_activation_bytes_by_module
    assert again_bytes["llm"] < 0.5 * kept_bytes["llm"]
    assert again_bytes["vision"] == kept_bytes["vision"]


def losses_of(plan, directory, *arguments) -> list[dict[str, float]]:
    """Losses per step of a training run under the plan."""
    cpu.install()
    from megatron_mosaic.any2any import pretrain

    command = ["--mosaic-plan", written(plan, directory), "--mosaic-report", str(directory), "--lr", "1e-3", *arguments]
    run_forked(plan.world_size, with_command_line, command, pretrain.main)
    return [json.loads(line) for line in (directory / "losses.jsonl").read_text().splitlines()]


def test_a_plan_is_checked_in_fp32_with_its_own_sharding(tmp_path, monkeypatch) -> None:
    """bf16 is a thousand times coarser than the tolerance: a check in it could not be passed."""
    finish = Runtime._finish

    def note(self: Runtime) -> None:
        if self.view.rank == 0:
            used = [self._args.bf16, self._args.use_distributed_optimizer, self.plan.training.format]
            (tmp_path / "used.json").write_text(json.dumps(used))
        finish(self)

    monkeypatch.setattr(Runtime, "_finish", note)  # forked ranks inherit it
    plan = replace(cases.OVERLAPPING, training=TrainingSetup(format=Format.bf16, sharding=Sharding.optimizer))
    parity = check_plan(written(plan, tmp_path), steps=2)
    assert parity.ok and parity.grad_rel_err_max > 0, parity.as_dict()
    assert parity.as_dict()["format"] == "fp32"
    assert json.loads((tmp_path / "used.json").read_text()) == [False, True, "fp32"]
    assert load_plan(tmp_path / "plan.yaml").training.format is Format.bf16, "the user's file was changed"


@pytest.mark.parametrize(
    ("sharding", "words", "where"),
    [
        (Sharding.none, DISTRIBUTED_OPTIMIZER, "--use-distributed-optimizer"),
        (Sharding.parameters, [], "training.sharding"),
        (Sharding.optimizer, ["--bf16"], "--bf16"),
    ],
)
def test_what_cannot_be_checked_is_refused_by_name(sharding, words, where, tmp_path) -> None:
    plan = replace(cases.TWO_RANKS, training=TrainingSetup(sharding=sharding))
    with pytest.raises(MosaicError) as caught:
        check_plan(written(plan, tmp_path), megatron_args=words)
    assert caught.value.where == where


def test_a_run_obeys_the_format_and_sharding_of_its_plan(tmp_path) -> None:
    """As if the flags had been given, to the bit; and the format makes a difference."""
    steady = ["--train-iters", "2", "--eval-iters", "0"]
    said = TrainingSetup(format=Format.bf16, sharding=Sharding.optimizer)
    by_plan = losses_of(replace(cases.TWO_RANKS, training=said), tmp_path, *steady)
    assert by_plan == losses_of(cases.TWO_RANKS, tmp_path, *steady, "--bf16", *DISTRIBUTED_OPTIMIZER)
    assert all(math.isfinite(value) for step in by_plan for value in step.values())
    fp32 = losses_of(replace(cases.TWO_RANKS, training=replace(said, format=Format.fp32)), tmp_path, *steady)
    assert fp32 != by_plan and fp32[0]["loss"] == pytest.approx(by_plan[0]["loss"], rel=1e-2)


def test_bf16_trains_with_finite_losses(tmp_path) -> None:
    losses = losses_of(cases.OVERLAPPING, tmp_path, "--bf16", "--train-iters", "4", "--eval-iters", "0")
    assert len(losses) == 4
    assert all(math.isfinite(value) for step in losses for value in step.values()), losses


def test_evaluation_between_steps_changes_no_training_loss(tmp_path) -> None:
    """Forward-only steps run the same ranks and channels; training afterwards must not notice them."""
    steady = [
        "--train-iters",
        "3",
        "--eval-interval",
        "1",
        "--lr-decay-style",
        "constant",
        "--lr-warmup-fraction",
        "0.0",
    ]
    without = losses_of(cases.OVERLAPPING, tmp_path, *steady, "--eval-iters", "0")
    with_evaluation = losses_of(cases.OVERLAPPING, tmp_path, *steady, "--eval-iters", "2")
    assert len(without) == 3 and with_evaluation == without


def test_two_runs_are_equal_in_every_bit(tmp_path) -> None:
    plan = replace(cases.TWO_RANKS, global_batch_size=8)
    runs = [losses_of(plan, tmp_path, "--train-iters", "3", "--eval-iters", "0") for _ in range(2)]
    assert runs[0] == runs[1] and len(runs[0]) == 3
