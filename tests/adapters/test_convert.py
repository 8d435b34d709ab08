"""Checkpoints from the stock script to plans and back: every parameter to the bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_mosaic.errors import ConfigError
from megatron_mosaic.launch.forked import run_forked
from megatron_mosaic.plan.plan_file import load_plan
from tests.adapters import test_mimo
from tests.adapters.llava_cases import ARGUMENTS, CHECKOUT, SCRIPT, needs_checkout, write_plan
from tests.adapters.test_stock import ARGUMENTS as GPT_ARGUMENTS
from tests.adapters.test_stock import HEAD
from tests.adapters.test_stock import SCRIPT as GPT_SCRIPT

WORDS = ("--eval-iters", "0", "--eval-interval", "1000", "--save-interval", "1000", "--lr-decay-style", "constant")
BATCH = ("--micro-batch-size", "2", "--global-batch-size", "8")
STILL = ("--train-iters", "1", "--lr", "0", "--min-lr", "0")  # a step that moves nothing
PLAN_A = {"vision": "ranks: 0-1, layout: {dp: 2}", "llm": "ranks: 0-1, layout: {tp: 2}"}
PLAN_B = {"vision": "ranks: 1", "llm": "ranks: 0-1, layout: {pp: 2}"}


def run_stock(script: str, words: tuple[str, ...], ckpt_format: str) -> None:
    """On one process: the script without a plan, with the defaults that a CPU needs."""
    from megatron_mosaic.adapters.arguments import script_defaults
    from megatron_mosaic.adapters.script import run_main
    from megatron_mosaic.parallel_state_ext.rebound.rebind import install_vision_norm, rebind_arguments
    from megatron_mosaic.runtime.layers.norms import TorchNorm

    def add(parser):
        parser = stock_add(parser)
        parser.set_defaults(**{**script_defaults(), "ckpt_format": ckpt_format})
        return parser

    install_vision_norm(TorchNorm)
    stock_add, stock_validate = rebind_arguments(add=add, validate=lambda args, d=None: stock_validate(args, d or {}))
    run_main(script, [*words, *WORDS, *BATCH])


def run_planned(script: str, words: tuple[str, ...], plan_path: str) -> None:
    from megatron_mosaic.run import run_script

    run_script(script, [*words, *WORDS], load_plan(plan_path))


def prepare() -> None:
    from megatron_mosaic.adapters import stock  # noqa: F401  forked ranks inherit it
    from megatron_mosaic.parallel_state_ext.rebound import cpu

    cpu.install()


def stock_weights(saved: Path) -> dict[str, torch.Tensor]:
    (file,) = saved.glob("iter_*/mp_rank_00/model_optim_rng.pt")
    model = torch.load(file, weights_only=False)["model"]
    return {name: value for name, value in model.items() if value is not None}


def require_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys() and len(found) > 20
    differing = [name for name, value in expected.items() if not torch.equal(found[name], value)]
    assert not differing


@needs_checkout
@pytest.mark.slow
def test_a_vlm_from_stock_over_two_plans_to_stock(tmp_path):
    from megatron_mosaic.adapters.convert import convert

    prepare()
    first, last = str(tmp_path / "first"), str(tmp_path / "last")
    run_forked(1, run_stock, SCRIPT, (*ARGUMENTS, "--train-iters", "2", "--save", first), "torch")
    convert(first, str(tmp_path / "for-plans"))
    for name, modules, load in (("a", PLAN_A, "for-plans"), ("b", PLAN_B, "a")):
        plan = write_plan(tmp_path, modules, world_size=2)
        words = (*ARGUMENTS, *STILL, "--load", str(tmp_path / load), "--save", str(tmp_path / name))
        fresh = () if load == "for-plans" else ("--finetune",)
        run_forked(2, run_planned, SCRIPT, (*words, *fresh), plan)
    convert(str(tmp_path / "b"), str(tmp_path / "for-stock"))
    words = (*ARGUMENTS, *STILL, "--load", str(tmp_path / "for-stock"), "--save", last)
    run_forked(1, run_stock, SCRIPT, words, "torch")
    require_equal(stock_weights(Path(last)), stock_weights(Path(first)))


@pytest.mark.slow
def test_a_mimo_model_from_stock_over_a_plan_to_stock(tmp_path):
    """Gated layers cut over tp, and norms that megatron-core's local layers save under other names."""
    from megatron_mosaic.adapters.convert import convert

    prepare()
    words = (*test_mimo.ARGUMENTS, *test_mimo.ROPE)
    saved = {name: str(tmp_path / name) for name in ("first", "for-plans", "planned", "for-stock", "last")}
    run_forked(1, run_stock, test_mimo.SCRIPT, (*words, "--train-iters", "2", "--save", saved["first"]), "torch")
    assert convert(saved["first"], saved["for-plans"]) == "torch_dist"
    plan = tmp_path / "plan.yaml"
    entries = {"images": "ranks: 0-1, layout: {pp: 2}", "drawings": "ranks: 1", "llm": "ranks: 0-1, layout: {tp: 2}"}
    plan.write_text(
        "mosaic_plan: 1\nworkload: mimo\nworld_size: 2\nglobal_batch_size: 8\nmicro_batch_size: 2\nschedule: 1f1b\n"
        "modules:\n" + "".join(f"  {name}: {{{entry}}}\n" for name, entry in entries.items())
    )
    still = (*words, *STILL, "--load", saved["for-plans"], "--save", saved["planned"])
    run_forked(2, run_planned, test_mimo.SCRIPT, still, str(plan))
    assert convert(saved["planned"], saved["for-stock"]) == "torch"
    still = (*words, *STILL, "--load", saved["for-stock"], "--save", saved["last"])
    run_forked(1, run_stock, test_mimo.SCRIPT, still, "torch")
    require_equal(stock_weights(Path(saved["last"])), stock_weights(Path(saved["first"])))


@needs_checkout
@pytest.mark.slow
def test_a_gpt_from_stock_over_two_plans_to_stock(tmp_path):
    """Megatron's own format all the way: optimizer state too."""
    from megatron.core import dist_checkpointing

    from megatron_mosaic.adapters.single_process import world_of_one

    prepare()
    words = (*GPT_ARGUMENTS, "--train-iters", "2", "--hidden-dropout", "0", "--attention-dropout", "0")

    def saved(name: str) -> str:
        return str(tmp_path / name)

    run_forked(1, run_stock, GPT_SCRIPT, (*words, "--save", saved("first")), "torch_dist")
    for name, module, load in (("a", "layout: {tp: 2}", "first"), ("b", "layout: {pp: 2}", "a")):
        plan = tmp_path / f"{name}.yaml"
        plan.write_text(f"{HEAD}world_size: 2\nschedule: 1f1b\nmodules:\n  llm: {{ranks: 0-1, {module}}}\n")
        run_forked(2, run_planned, GPT_SCRIPT, (*words, "--load", saved(load), "--save", saved(name)), str(plan))
    run_forked(1, run_stock, GPT_SCRIPT, (*words, "--load", saved("b"), "--save", saved("last")), "torch_dist")
    with world_of_one():
        first, last = (
            dist_checkpointing.load_plain_tensors(f"{saved(name)}/iter_0000002") for name in ("first", "last")
        )
    tensors = [{name: value for name, value in found.items() if torch.is_tensor(value)} for found in (last, first)]
    require_equal(*tensors)
    assert any("exp_avg" in name for name in tensors[0])


def test_a_target_that_is_not_new_or_not_writable_is_refused(tmp_path):
    from megatron_mosaic.adapters.convert import convert

    source, target, file = tmp_path / "source", tmp_path / "target", tmp_path / "file"
    weights = source / "iter_0000001" / "mp_rank_00" / "model_optim_rng.pt"
    weights.parent.mkdir(parents=True)
    torch.save({"model": {"vision_model.ln_pre.weight": torch.zeros(2)}}, weights)
    (source / "latest_checkpointed_iteration.txt").write_text("1")
    (target / "release").mkdir(parents=True)  # as an interrupted conversion leaves it
    with pytest.raises(ConfigError, match="holds release"):
        convert(str(source), str(target))
    file.write_text("")
    with pytest.raises(ConfigError, match="a writable path"):
        convert(str(source), str(file / "inside"))


@needs_checkout
@pytest.mark.slow
def test_what_is_no_checkpoint_of_a_known_model_is_refused(tmp_path):
    from megatron_mosaic.adapters.convert import convert

    with pytest.raises(ConfigError, match="latest_checkpointed_iteration"):
        convert(str(tmp_path), str(tmp_path / "out"))
    prepare()
    words = (*GPT_ARGUMENTS, "--train-iters", "1", "--save", str(tmp_path / "gpt"))
    run_forked(1, run_stock, GPT_SCRIPT, words, "torch")
    with pytest.raises(ConfigError, match="LLaVAModel") as caught:
        convert(str(tmp_path / "gpt"), str(tmp_path / "out"))
    assert "embedding" in caught.value.got
    assert not (tmp_path / "out").exists() and CHECKOUT
