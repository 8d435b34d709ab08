"""What `mosaic check` may be asked: refused without torch, and what only a rank can see is refused the same way."""

from dataclasses import replace

import pytest

from megatron_mosaic.errors import ConfigError, PlanError, RankFailure
from megatron_mosaic.parity import check
from megatron_mosaic.parity.check import check_plan, require_checkable
from megatron_mosaic.plan import Layout
from tests.numerics import parity_cases as cases
from tests.numerics.parity_cases import written

PLAN = cases.TWO_RANKS


@pytest.mark.parametrize(
    ("words", "where"),
    [
        (["--hidden-dropout", "0.1"], "--hidden-dropout"),
        (["--attention-dropout=0.1"], "--attention-dropout"),
        (["--optimizer", "sgd"], "--optimizer"),
        (["--optimizer=sgd"], "--optimizer"),
        (["--bf16"], "--bf16"),
        (["--multi-latent-attention"], "--multi-latent-attention"),
        (["--decoupled-lr", "1e-4"], "--decoupled-lr"),
        (["--window-size", "(3, 0)"], "--window-size"),
        (["--softmax-type", "learnable"], "--softmax-type"),
        (["--recompute-activations"], "--recompute-activations"),
        (["--moe-layer-freq", "2"], "--moe-layer-freq"),
        (["--lr-decay-style", "WSD", "--lr-wsd-decay-iters", "2"], "--lr-decay-style"),
        (["--load", "checkpoints"], "--load"),
        (["--train-iters", "5"], "--train-iters"),
        (["--train-samples", "5"], "--train-samples"),
        (["--mosaic-plan", "other.yaml"], "--mosaic-plan"),
        (["--mosaic-lr-mult", "audio=2"], "--mosaic-lr-mult"),
        (["--tensor-model-parallel-size", "4"], "--tensor-model-parallel-size"),
        (["--global-batch-size=8"], "--global-batch-size"),
        (["--group-query-attention"], "--num-query-groups"),  # one group for two tp ranks
        (["--no-such-flag"], "--no-such-flag"),
        (["--lr-warmup-iters", "2"], "--lr-warmup-iters"),  # of two steps
        (["--lr-warmup-fraction", "1.0"], "--lr-warmup-fraction"),
        (["--lr-decay-iters", "0"], "--lr-decay-iters"),
        (["--min-lr", "1"], "--min-lr"),
        (["--lr", "nan"], "--min-lr"),
        (["--lr-warmup-init", "1"], "--lr-warmup-init"),
    ],
)
def test_refused_before_a_rank_starts(words, where) -> None:
    with pytest.raises(ConfigError) as caught:
        require_checkable(PLAN, words, steps=2)
    assert caught.value.where == where


@pytest.mark.parametrize(
    "words",
    [
        ["--lr-warmup-iters", "1"],
        ["--lr-decay-style", "cosine", "--lr-decay-iters", "7"],
        ["--train-iters", "2"],  # as many as --steps
        ["--tensor-model-parallel-size", "2", "--global-batch-size=4", "--micro-batch-size", "2"],
        ["--adam-eps", "1e-8", "--optimizer", "adam"],
    ],
)
def test_accepted(words) -> None:
    assert require_checkable(PLAN, words, steps=2) == ()


def test_whoever_sets_what_has_no_effect_is_told() -> None:
    (note,) = require_checkable(PLAN, ["--data-path", "text"])
    assert note.startswith("--data-path has no effect here")


def test_a_plan_that_cannot_run_is_refused_first() -> None:
    plan = cases.any2any_plan(("0", Layout()), ("0-1", Layout(tp=2)), world_size=2, batch=4, micro_batch=3)
    with pytest.raises(PlanError, match="global_batch_size"):
        require_checkable(plan, ["--fp16"])
    nowhere = replace(PLAN, modules={name: PLAN.modules[name] for name in ("vision", "generator")})
    with pytest.raises(PlanError, match="an entry for 'llm' too"):
        require_checkable(nowhere)


@pytest.mark.dist
def test_what_a_rank_refuses_is_wrong_input_and_no_failure(tmp_path, monkeypatch) -> None:
    plan = written(PLAN, tmp_path)
    with pytest.raises(ConfigError, match="max_position_embeddings") as caught:
        check_plan(plan, steps=1, megatron_args=["--max-position-embeddings", "3"])
    assert caught.value.where == "Megatron's validation of the arguments"

    def fail(*_: object) -> int:
        raise RuntimeError("not the input's fault")

    with pytest.raises(RankFailure, match="not the input's fault"):
        check.run_ranks(1, str(tmp_path), [], fail)
