"""A script around the stock MimoModel under plans of three modules: what Megatron computes on one process."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_mosaic.parity.scripts.check import check_script
from megatron_mosaic.parity.verdict import Parity

SCRIPT = str(Path(__file__).with_name("mimo_script.py"))
ARGUMENTS = (
    *("--num-layers", "4", "--hidden-size", "32", "--num-attention-heads", "4", "--seq-length", "32"),
    *("--max-position-embeddings", "64", "--lr", "1e-3", "--tokenizer-type", "NullTokenizer", "--vocab-size", "127"),
    *("--untie-embeddings-and-output-weights", "--dataloader-type", "external"),
)
FROZEN = ("--freeze-images",)
ROPE = ("--position-embedding-type", "rope", "--normalization", "RMSNorm", "--swiglu")
# Entries of (images, drawings, llm), ranks, further lines, arguments
PLANS: dict[str, tuple[tuple[str, str, str], int, str, tuple[str, ...]]] = {
    "disjoint": (("ranks: 0", "ranks: 1", "ranks: 2-3, layout: {dp: 2}"), 4, "", ()),
    "partly overlapping": (
        ("ranks: 0-1, layout: {dp: 2}", "ranks: 1", "ranks: 1-2, layout: {tp: 2}"),
        3,
        "",
        (),
    ),
    "pipelines": (
        ("ranks: 0-1, layout: {pp: 2}", "ranks: 0-1, layout: {dp: 2}", "ranks: 0-1, layout: {pp: 2}"),
        2,
        "",
        (),
    ),
    "cp": (
        ("ranks: 0-1, layout: {cp: 2}", "ranks: 0-1, layout: {tp: 2}", "ranks: 0-1, layout: {cp: 2}"),
        2,
        "",
        ROPE,
    ),
    "sequence parallel": (
        (
            "ranks: 0-1, layout: {tp: 2}, sequence_parallel: true",
            "ranks: 1",
            "ranks: 0-1, layout: {tp: 2}, sequence_parallel: true",
        ),
        2,
        "",
        (),
    ),
    "nested": (
        ("ranks: 0-1, layout: {dp: 2}", "ranks: 0", "ranks: 0-1, layout: {pp: 2}"),
        2,
        "schedule: nested\n",
        FROZEN,
    ),
    "virtual stages": (
        ("ranks: 0-1, layout: {dp: 2}", "ranks: 1", "ranks: 0-1, layout: {pp: 2, vpp: 2}"),
        2,
        "schedule: interleaved\n",
        ROPE,
    ),
    "dp 3": (
        ("ranks: 0-2, layout: {dp: 3}", "ranks: 0-1, layout: {dp: 2}", "ranks: 0-2, layout: {dp: 3}"),
        3,
        "",
        FROZEN,
    ),
    "sharded optimizer": (
        ("ranks: 0-1, layout: {dp: 2}, recompute: whole", "ranks: 0", "ranks: 0-1, layout: {dp: 2}, recompute: full"),
        2,
        "training: {format: fp32, sharding: optimizer}\n",
        (),
    ),
}


def check(name: str, directory: Path, *words: str) -> Parity:
    entries, world_size, more, arguments = PLANS[name]
    batch = 12 if world_size == 3 else 8
    head = (
        f"mosaic_plan: 1\nworkload: mimo\nworld_size: {world_size}\nglobal_batch_size: {batch}\nmicro_batch_size: 2\n"
    )
    head += more if "schedule" in more else f"schedule: 1f1b\n{more}"
    path = directory / "plan.yaml"
    names = ("images", "drawings", "llm")
    modules = "".join(f"  {module}: {{{entry}}}\n" for module, entry in zip(names, entries, strict=True))
    path.write_text(f"{head}modules:\n{modules}")
    return check_script(str(path), SCRIPT, steps=2, megatron_args=[*ARGUMENTS, *arguments, *words])


def require_same(parity: Parity) -> None:
    assert parity.loss_rel_err <= 2e-6
    assert parity.ok, (parity.grad_rel_err_by_module, parity.sentences)


def test_computes_what_one_process_computes(tmp_path):
    require_same(check("partly overlapping", tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("plan", PLANS)
def test_every_plan_computes_what_one_process_computes(plan, tmp_path):
    require_same(check(plan, tmp_path))
