"""The unmodified pretrain_gpt.py under plans of one module: losses and norms of one process, from the same weights.

Megatron draws other weights in other layouts, so both sides draw them by name.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from megatron_mosaic.launch.forked import run_forked
from megatron_mosaic.plan.plan_file import load_plan
from tests.adapters.llava_cases import CHECKOUT, needs_checkout

SCRIPT = str(Path(CHECKOUT) / "pretrain_gpt.py")
ARGUMENTS = (
    *("--num-layers", "4", "--hidden-size", "32", "--num-attention-heads", "4", "--seq-length", "16"),
    *("--max-position-embeddings", "64", "--train-iters", "3", "--lr", "1e-3", "--lr-decay-style", "constant"),
    *("--tokenizer-type", "NullTokenizer", "--vocab-size", "127", "--split", "949,50,1", "--mock-data"),
    *("--eval-iters", "0", "--eval-interval", "1000", "--hidden-dropout", "0", "--attention-dropout", "0"),
    # Tied, the last of several stages would draw its copy under another name
    *("--adam-eps", "1e-3", "--init-method-std", "0.1", "--untie-embeddings-and-output-weights"),
)
HEAD = "mosaic_plan: 1\nworkload: gpt\nglobal_batch_size: 8\nmicro_batch_size: 2\n"
PLANS = {
    "sequence parallel": "layout: {tp: 2}, sequence_parallel: true",
    "cp": "layout: {cp: 2}",
    "tp": "layout: {tp: 2}",
    "dp": "layout: {dp: 2}",
    "virtual stages": "layout: {pp: 2, vpp: 2}",
    "recomputed inside attention": "layout: {pp: 2}, recompute: selective",
    "recomputed": "layout: {tp: 2}, recompute: full",
}


def train(plan_path: str, words: tuple[str, ...], directory: str) -> None:
    """On a rank: run the script with weights drawn by name; the last rank writes its losses down."""
    from megatron.core.models.gpt import GPTModel

    from megatron_mosaic.adapters.stock import run_script
    from megatron_mosaic.parallel_state_ext.rebound.rebind import watch_steps
    from megatron_mosaic.runtime.model import initialize_by_name

    stock = GPTModel.__init__

    def drawn_by_name(self, *args, **kwargs):
        stock(self, *args, **kwargs)
        initialize_by_name(self, "llm", 1)

    GPTModel.__init__ = drawn_by_name
    losses = []
    watch_steps(lambda: None, lambda found: losses.append({key: float(value) for key, value in found.items()}))
    run_script(SCRIPT, [*ARGUMENTS, *words], load_plan(plan_path))
    if losses and losses[0]:
        Path(directory, f"losses-{os.environ['RANK']}.json").write_text(
            json.dumps([each["lm loss"] for each in losses])
        )


def losses_under(module: str, directory: Path, words: tuple[str, ...] = ()) -> list[float]:
    from megatron_mosaic.adapters import stock  # noqa: F401  forked ranks inherit it
    from megatron_mosaic.parallel_state_ext.rebound import cpu

    cpu.install()
    directory.mkdir()
    world_size = 2 if "2" in module else 1
    ranks = "0-1" if world_size == 2 else "0"
    schedule = "interleaved" if "vpp" in module else "1f1b"
    path = directory / "plan.yaml"
    path.write_text(
        f"{HEAD}world_size: {world_size}\nschedule: {schedule}\nmodules:\n  llm: {{ranks: {ranks}, {module}}}\n"
    )
    run_forked(world_size, train, str(path), words, str(directory))
    return json.loads(sorted(directory.glob("losses-*.json"))[-1].read_text())


def require_same(plan: str, directory: Path, words: tuple[str, ...] = ()) -> None:
    expected = losses_under("layout: {dp: 1}", directory / "alone", words)
    assert losses_under(PLANS[plan], directory / "plan", words) == pytest.approx(expected, rel=2e-6)
    assert len(expected) == 3 and expected[0] != expected[-1]


@needs_checkout
def test_sequence_parallelism_of_a_plan_is_honoured(tmp_path):
    require_same("sequence parallel", tmp_path)


@needs_checkout
@pytest.mark.slow
@pytest.mark.parametrize("plan", PLANS)
def test_every_plan_trains_as_one_process(plan, tmp_path):
    require_same(plan, tmp_path)


@needs_checkout
@pytest.mark.slow
@pytest.mark.parametrize("plan", ["sequence parallel", "cp", "virtual stages"])
def test_modern_layers(plan, tmp_path):
    words = ("--swiglu", "--normalization", "RMSNorm", "--position-embedding-type", "rope", "--disable-bias-linear")
    require_same(plan, tmp_path, words)
