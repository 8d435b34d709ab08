"""The unmodified pretrain_gpt.py under plans of one module, which Megatron lays out: what it computes on one process.

Megatron draws other weights in other layouts, so both sides draw them by name.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from megatron_mosaic.parity.scripts.check import check_script
from megatron_mosaic.parity.verdict import Parity
from tests.adapters.llava_cases import CHECKOUT, needs_checkout

SCRIPT = str(Path(CHECKOUT) / "pretrain_gpt.py")
ARGUMENTS = (
    *("--num-layers", "4", "--hidden-size", "32", "--num-attention-heads", "4", "--seq-length", "16"),
    *("--max-position-embeddings", "64", "--lr", "1e-3", "--init-method-std", "0.1"),
    *("--tokenizer-type", "NullTokenizer", "--vocab-size", "127", "--split", "949,50,1", "--mock-data"),
)
MODERN = ("--swiglu", "--normalization", "RMSNorm", "--position-embedding-type", "rope", "--disable-bias-linear")
EXPERTS = (
    "--num-experts",
    "4",
    "--moe-router-topk",
    "2",
    "--moe-token-dispatcher-type",
    "alltoall",
    "--disable-bias-linear",
)
HEAD = "mosaic_plan: 1\nworkload: gpt\nglobal_batch_size: 8\nmicro_batch_size: 2\n"
PLANS = {
    "sequence parallel": "layout: {tp: 2}, sequence_parallel: true",
    "cp": "layout: {cp: 2}",
    "tp": "layout: {tp: 2}",
    "dp": "layout: {dp: 2}",
    "pp": "layout: {pp: 2}",
    "virtual stages": "layout: {pp: 2, vpp: 2}",
    "recomputed inside attention": "layout: {pp: 2}, recompute: selective",
    "recomputed": "layout: {tp: 2}, recompute: full",
    "tp and pp": "layout: {tp: 2, pp: 2}",
}
EXPERT_PLANS = {
    "ep": "layout: {dp: 2, ep: 2}",
    "ep over pp": "layout: {pp: 2, dp: 2, ep: 2}",
    "experts over tp": "layout: {tp: 2, etp: 2}, sequence_parallel: true",
    "ep over tp": "layout: {tp: 2, ep: 2}, sequence_parallel: true",
}
SHARDED = "training: {format: fp32, sharding: optimizer}\n"


def check(module: str, directory: Path, *words: str, more: str = "") -> Parity:
    world_size = 2 ** len(re.findall(r"\b(tp|cp|pp|dp): 2", module))
    schedule = "interleaved" if "vpp" in module else "1f1b"
    ranks = f"0-{world_size - 1}"
    path = directory / "plan.yaml"
    path.write_text(
        f"{HEAD}world_size: {world_size}\nschedule: {schedule}\n{more}modules:\n  llm: {{ranks: {ranks}, {module}}}\n"
    )
    return check_script(str(path), SCRIPT, steps=3, megatron_args=[*ARGUMENTS, *words])


def require_same(parity: Parity) -> None:
    assert parity.loss_rel_err <= 2e-6
    assert parity.ok, (parity.grad_rel_err_by_module, parity.sentences)


@needs_checkout
def test_sequence_parallelism_of_a_plan_is_honoured(tmp_path):
    require_same(check(PLANS["sequence parallel"], tmp_path))


@needs_checkout
@pytest.mark.slow
@pytest.mark.parametrize("plan", PLANS)
def test_every_plan_computes_what_one_process_computes(plan, tmp_path):
    require_same(check(PLANS[plan], tmp_path))


@needs_checkout
@pytest.mark.slow
@pytest.mark.parametrize("plan", ["dp", "tp", "virtual stages"])
def test_a_sharded_optimizer(plan, tmp_path):
    require_same(check(PLANS[plan], tmp_path, more=SHARDED))


@needs_checkout
@pytest.mark.slow
@pytest.mark.parametrize("plan", ["sequence parallel", "cp", "virtual stages"])
def test_modern_layers(plan, tmp_path):
    require_same(check(PLANS[plan], tmp_path, *MODERN, "--untie-embeddings-and-output-weights"))


@needs_checkout
@pytest.mark.slow
@pytest.mark.parametrize("plan", EXPERT_PLANS)
def test_experts(plan, tmp_path):
    require_same(check(EXPERT_PLANS[plan], tmp_path, *EXPERTS))
