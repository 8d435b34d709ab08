"""Flags that the table calls honoured: layers compute the same under every layout, and the loop obeys its own."""

import pytest
import torch

from megatron_mosaic.any2any.stages import BackboneStage
from megatron_mosaic.definition import StageInputs
from megatron_mosaic.parity.check import check_plan
from megatron_mosaic.plan import Layout
from tests.numerics import parity_cases as cases
from tests.numerics.checkpoint_runs import Run, losses, run_all
from tests.numerics.parity_cases import written

pytestmark = pytest.mark.dist

ROPE = ["--position-embedding-type", "rope"]
GQA = ["--group-query-attention", "--num-query-groups", "2"]
SPLIT_TOKENS = cases.any2any_plan(("0-1", Layout(tp=2)), ("0-3", Layout(tp=2, cp=2)), ("2-3", Layout(pp=2)), batch=4)
PIPELINE = cases.any2any_plan(("0", Layout()), ("0-1", Layout(pp=2)), ("1", Layout()), world_size=2, batch=4)

LLAMA = [*ROPE, "--rotary-percent", "0.5", "--rotary-base", "500", "--swiglu", "--normalization", "RMSNorm", *GQA]
LLAMA += ["--kv-channels", "24", "--disable-bias-linear", "--lr-warmup-iters", "1", "--lr-decay-style", "cosine"]
OTHERS = [*ROPE, "--rotary-interleaved", "--rotary-seq-len-interpolation-factor", "2", "--quick-geglu"]
OTHERS += [
    "--group-query-attention",
    "--softmax-type",
    "off-by-one",
    "--norm-epsilon",
    "1e-3",
    "--lr-decay-style",
    "linear",
]


def parity_of(plan, directory, words, steps=2):
    return check_plan(written(cases.split_over_tp(plan), directory), steps=steps, megatron_args=words)


@pytest.mark.parametrize(
    ("plan", "words", "steps"),
    [
        pytest.param(SPLIT_TOKENS, LLAMA, 3, id="rope swiglu rmsnorm gqa: tp2 cp2 with split tokens, pp2"),
        pytest.param(PIPELINE, OTHERS, 2, id="rope geglu one group: pp2"),
    ],
)
def test_layers_compute_the_same_under_every_layout(plan, words, steps, tmp_path) -> None:
    parity = parity_of(plan, tmp_path, words, steps)
    assert parity.ok and parity.grad_rel_err_max > 0, parity.as_dict()


def test_angles_of_other_tokens_are_found(tmp_path, monkeypatch) -> None:
    """The control: with context parallelism a rank's tokens are not the first ones."""

    def angles(self: BackboneStage, inputs: StageInputs) -> torch.Tensor:
        return self.rotary.get_emb(len(inputs.tensors["positions"]))

    monkeypatch.setattr(BackboneStage, "_angles", angles)
    parity = parity_of(SPLIT_TOKENS, tmp_path, ROPE, 1)
    assert not parity.ok and parity.grad_rel_err_by_module["llm"] > 1e-2


WIDE = {
    "tp2": Layout(tp=2),
    "cp2": Layout(cp=2),
    "pp2": Layout(pp=2),
    "tp2 cp2": Layout(tp=2, cp=2),
    "pp2 vpp2": Layout(pp=2, vpp=2),
}


@pytest.mark.slow
@pytest.mark.parametrize("layout", WIDE)
@pytest.mark.parametrize(
    "words",
    [ROPE, [*ROPE, "--use-rope-scaling"], GQA, ["--swiglu"], ["--normalization", "RMSNorm"], ["--squared-relu"], LLAMA],
    ids=" ".join,
)
def test_every_flag_under_every_axis(words, layout, tmp_path) -> None:
    placed = WIDE[layout]
    size = placed.num_ranks
    plan = cases.any2any_plan(("0", Layout()), (f"0-{size - 1}", placed), world_size=size, batch=4)
    parity = parity_of(plan, tmp_path, words)
    assert parity.ok, parity.as_dict()


LOOP = {
    "default": (),
    "sgd": ("--optimizer", "sgd"),
    "sgd-slow": ("--optimizer", "sgd", "--sgd-momentum", "0.1"),
    "weight-decay": ("--weight-decay", "0.9"),
    "growing-decay": (
        *("--weight-decay-incr-style", "linear"),
        *("--start-weight-decay", "0.0", "--end-weight-decay", "0.9"),
    ),
    "clip": ("--clip-grad", "0.01"),
    "beta1": ("--adam-beta1", "0.5"),
    "beta2": ("--adam-beta2", "0.5"),
    "eps": ("--adam-eps", "1e-2"),
    "linear": ("--lr-decay-style", "linear"),
    "short": ("--lr-decay-style", "linear", "--lr-decay-iters", "2"),
    "min": ("--lr-decay-style", "linear", "--min-lr", "1e-3"),
    "stable": ("--lr-decay-style", "WSD", "--lr-wsd-decay-iters", "3"),
    "root": ("--lr-decay-style", "inverse-square-root"),
    "init": ("--lr-warmup-init", "1e-3", "--lr-warmup-fraction", "0.5"),
    "bf16": ("--bf16",),
    "exit": ("--exit-interval", "2"),
}


QUICK = ("default", "sgd", "sgd-slow", "growing-decay", "stable", "init", "exit")


@pytest.mark.parametrize("names", [QUICK, pytest.param(tuple(LOOP), marks=pytest.mark.slow)], ids=["some", "all"])
def test_the_loop_obeys_its_flags(names, tmp_path) -> None:
    """No two command lines train alike: the last of four losses differs from that of every other."""
    run_all([Run(name=name, plan=cases.ONE_RANK, arguments=LOOP[name]) for name in names], tmp_path)
    curves = {name: [step["loss"] for step in losses(tmp_path, name)] for name in names}
    assert curves.pop("exit") == curves["default"][:2]
    assert all(len(curve) == 4 for curve in curves.values())
    assert len({curve[-1] for curve in curves.values()}) == len(curves), curves
