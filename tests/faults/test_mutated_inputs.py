"""Damaged plan, model, cluster, profile, GPU-type and schedule files and override words, through every command that
reads them: the exit status is 0, 1 or 2, nobody sees a traceback, and a refusal costs little time and memory.

A case is (seed, number): MOSAIC_FUZZ_SEED and MOSAIC_FUZZ_CASES choose others than the ones named below.
"""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import pytest

import megatron_mosaic.cli.check
import megatron_mosaic.cli.compare
import megatron_mosaic.cli.plan
import megatron_mosaic.cli.show
import megatron_mosaic.cli.simulate
import megatron_mosaic.cli.train
import megatron_mosaic.parity.check
from megatron_mosaic.config import load_workload
from megatron_mosaic.cost_model.hardware.profile import format_profile
from megatron_mosaic.plan.plan_file import parse_plan
from megatron_mosaic.schedules import build_schedule
from megatron_mosaic.schedules.text import format_schedule
from tests.cases import make_profile
from tests.faults.limited import Outcome, run_limited
from tests.faults.mutations import BOMBS, mutate_file, mutate_words

MAX_CPU_S = 5.0
MAX_MEMORY_BYTES = 10**9
STARTED = 75  # the input was accepted, and ranks would start now

DIGITS = load_workload(["model=any2any-digits"])
PLAN = """\
mosaic_plan: 1
workload: any2any-digits
world_size: 4
global_batch_size: 8
micro_batch_size: 2
schedule: 1f1b
cluster: {kind: local, num_ranks: 4}
training: {format: fp32}
modules:
  vision: {ranks: 0-1, layout: {dp: 2}, quota: 0.5, recompute: full}
  llm: {ranks: 0-3, layout: {tp: 2, pp: 2}, sequence_parallel: true}
  generator: {ranks: 2-3, layout: {dp: 2}}
predicted: {step_s: 0.5, peak_bytes: 1.0e+9, cost_model: made up}
"""
PLAN_ON_GPUS = """\
mosaic_plan: 1
workload: vlm_7b
world_size: 8
global_batch_size: 32
micro_batch_size: 2
schedule: interleaved
cluster: h100_1x8
training: {format: bf16, sharding: optimizer}
modules:
  vision: {ranks: "0-1,4-5", layout: {dp: 4}}
  llm: {ranks: 0-7, layout: {tp: 2, pp: 2, vpp: 2, dp: 2}, recompute: selective}
"""
MODEL = (files("megatron_mosaic.conf") / "model" / "any2any-digits.yaml").read_text(encoding="utf-8")
GPU_TYPE = """\
gpu_type: 1
base: h100_sxm
bandwidth_frac: 0.87
launch_s: 2.0e-6
half_depth: 300.0
sources: {bandwidth_frac: made up, launch_s: made up, half_depth: made up}
"""
PROFILE = format_profile(make_profile(DIGITS))
SCHEDULE = format_schedule(build_schedule(parse_plan(PLAN), DIGITS))
QUICK = ["model=any2any-digits", "workload.global_batch_size=8", "search.max_tp=2", "search.max_pp=2"]
GPUS = [*QUICK, "cluster=h100_1x8", "cluster.gpus_per_node=2"]  # a search of a second, also where a word is lost
LINK_KEYS = [f"cluster.{link}.{key}" for link in ("intra", "inter") for key in ("bytes_per_s", "latency_s", "source")]
CLUSTER_KEYS = ["cluster", "cluster.gpu", "cluster.kind", "cluster.num_nodes", "cluster.gpus_per_node", *LINK_KEYS]
MODEL_KEYS = ["model", "model.name", "model.edges", "model.global_batch_size", "model.edges.0.width"] + [
    f"model.modules.{module}.{key}"
    for module in ("vision", "llm")
    for key in ("role", "num_layers", "hidden_size", "num_heads", "ffn_hidden_size", "tokens_per_item", "vocab_size",
                "items_per_sample", "num_experts", "num_query_groups", "frozen", "gated", "moe_top_k")
]  # fmt: skip
OTHER_KEYS = [
    "workload.global_batch_size", "workload.items_per_sample.vision", "workload.training.format", "search.max_tp",
    "workload.training.tp_overlap_frac", "workload.training.sharding", "search.memory_frac", "search.max_pp",
    "search.max_micro_batch_size", "search.min_gain_frac", "cluster.num_ranks", "serch.max_tp", "search",
]  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One damaged input and the command that reads it."""

    seed: str
    words: list[str]
    data: bytes = b""


Maker = Callable[[random.Random, str], tuple[list[str], bytes]]  # -> words of a command, the file they name


def _file_case(text: str, *commands: list[str]) -> Maker:
    """A damaged file, named FILE in one of the commands."""
    return lambda rng, path: ([word.replace("FILE", path) for word in rng.choice(commands)], mutate_file(rng, text))


def _word_case(keys: list[str], *commands: list[str]) -> Maker:
    """Damaged override words behind one of the commands."""
    return lambda rng, path: ([*rng.choice(commands), *mutate_words(rng, GPUS, keys)], b"")


KINDS = {
    "plan": _file_case(
        PLAN, ["show", "FILE"], ["show", "FILE", "--json"], ["simulate", "FILE"], ["check", "FILE"], ["train", "FILE"],
    ),
    "plan on GPUs": _file_case(
        PLAN_ON_GPUS, ["show", "FILE"], ["simulate", "FILE", "cluster=h100_1x8"],
        ["simulate", "FILE", "cluster=h100_1x8", "--json"],
    ),
    "model": _file_case(
        MODEL, ["check", "sound.yaml", "--model", "FILE"], ["train", "sound.yaml", "--workload", "FILE"],
    ),
    "model words": _word_case(MODEL_KEYS, ["plan"], ["compare", "--json"], ["simulate", "sound.yaml"]),
    "cluster words": _word_case(CLUSTER_KEYS, ["plan", "--json"], ["compare"], ["simulate", "sound.yaml"]),
    "words": _word_case(OTHER_KEYS, ["plan"], ["compare", "--json"], ["simulate", "sound.yaml"], ["plan", "--json"]),
    "profile": _file_case(
        PROFILE, ["simulate", "sound.yaml", "--profile", "FILE"],
        ["plan", *QUICK, "cluster=local", "--profile", "FILE"],
        ["compare", *QUICK, "cluster=local", "--profile", "FILE"],
        ["train", "sound.yaml", "--profile", "FILE"],
    ),
    "gpu type": _file_case(
        GPU_TYPE, ["plan", *GPUS, "cluster.gpu=FILE"], ["compare", *GPUS, "cluster.gpu=FILE"],
        ["simulate", "sound.yaml", *GPUS, "cluster.gpu=FILE"],
    ),
    "schedule": _file_case(SCHEDULE, ["train", "sound.yaml", "--mosaic-schedule", "FILE"]),
}  # fmt: skip


def make_case(seed: str, number: int, path: str) -> Case:
    """Case `number` of a campaign; kinds take turns."""
    rng = random.Random(f"{seed}/{number}")
    words, data = list(KINDS.values())[number % len(KINDS)](rng, path)
    return Case(seed=f"{seed}/{number}", words=words, data=data)


def _stop_before_ranks() -> None:
    """In the child: what would start a rank ends it instead, with STARTED."""

    def start(*_: object, **__: object) -> None:
        raise SystemExit(STARTED)

    megatron_mosaic.cli.train.run_torchrun = start  # type: ignore[assignment]
    megatron_mosaic.cli.check.import_runtime = start  # type: ignore[assignment]


def run_case(case: Case, directory: Path) -> Outcome:
    """What the command makes of the case; its file is left in the directory."""
    (directory / "mutated.yaml").write_bytes(case.data)
    return run_limited(case.words, directory, before=_stop_before_ranks)


def complaint(outcome: Outcome) -> str:
    """What is wrong with how a command ended; empty: nothing."""
    allowed = (0, 1, 2, STARTED)
    if outcome.status not in allowed:
        return f"exit status {outcome.status}"
    if "Traceback" in outcome.err:
        return "a traceback"
    if outcome.status == 2 and not all(part in outcome.err for part in ("got:", "expected:", "fix:")):
        return "a refusal without got, expected, fix"
    if outcome.cpu_s > MAX_CPU_S:
        return f"{outcome.cpu_s:.1f} CPU s"
    return f"{outcome.memory_bytes / 1e6:.0f} MB" if outcome.memory_bytes > MAX_MEMORY_BYTES else ""


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Sound files in the working directory of the commands."""
    (tmp_path / "sound.yaml").write_text(PLAN)
    (tmp_path / "gpus.yaml").write_text(PLAN_ON_GPUS)
    (tmp_path / "profile.yaml").write_text(PROFILE)
    monkeypatch.setenv("MOSAIC_PROFILE", str(tmp_path / "profile.yaml"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def campaign(directory: Path, seed: str, numbers: range) -> None:
    """Run the cases; print what came of them; fail with every case that ended as none may."""
    statuses: Counter[int] = Counter()
    worst_s = worst_bytes = 0.0
    failures = []
    for number in numbers:
        case = make_case(seed, number, "mutated.yaml")
        outcome = run_case(case, directory)
        statuses[outcome.status] += 1
        worst_s, worst_bytes = max(worst_s, outcome.cpu_s), max(worst_bytes, outcome.memory_bytes)
        if found := complaint(outcome):
            last = outcome.err.strip().splitlines()[-1:] or [""]
            failures.append(f"case {case.seed}: {found}: {case.words}\n    {last[0][:300]}")
    print(
        f"seed {seed}, cases {numbers}: exit statuses {dict(sorted(statuses.items()))} ({STARTED}: ranks would start),"
    )
    print(f"at most {worst_s:.2f} CPU s and {worst_bytes / 1e6:.0f} MB; {len(failures)} failures")
    assert not failures, "\n".join(failures)


def test_sound_inputs_pass(directory):
    for words, status in (
        (["show", "sound.yaml"], 0),
        (["show", "gpus.yaml"], 0),
        (["simulate", "gpus.yaml", "cluster=h100_1x8"], 0),
        (["simulate", "sound.yaml"], 0),
        (["plan", *GPUS], 0),
        (["compare", *QUICK, "cluster=local"], 0),
        (["check", "sound.yaml"], STARTED),
        (["train", "sound.yaml"], STARTED),
    ):
        outcome = run_case(Case(seed="", words=words), directory)
        assert outcome.status == status, outcome.err
        assert not complaint(outcome)


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_bomb_costs_no_more_than_its_reading(directory, bomb):
    sound = run_case(Case(seed="", words=["show", "sound.yaml"]), directory)
    refused = run_case(Case(seed="", words=["show", "mutated.yaml"], data=(PLAN + bomb).encode()), directory)
    assert refused.status == 2, refused.err
    assert "mutated.yaml:" in refused.err  # with the line
    assert refused.cpu_s < sound.cpu_s + 0.5


def test_a_case_is_the_same_each_time():
    cases = [make_case("seed", number, "file") for number in range(50)]
    assert cases == [make_case("seed", number, "file") for number in range(50)]
    assert cases != [make_case("other", number, "file") for number in range(50)]


def test_what_no_command_may_do_is_noticed(directory, monkeypatch):
    def crash(_: object) -> int:
        raise KeyError("modules")

    monkeypatch.setattr("megatron_mosaic.cli.show.load_plan", crash)
    with pytest.raises(AssertionError, match=r"case short/.*: exit status 70: .*show"):
        campaign(directory, "short", range(10))


def test_sixty_damaged_inputs(directory):
    campaign(directory, os.environ.get("MOSAIC_FUZZ_SEED", "short"), range(60))


@pytest.mark.slow
def test_a_thousand_damaged_inputs(directory):
    cases = int(os.environ.get("MOSAIC_FUZZ_CASES", "1000"))
    campaign(directory, os.environ.get("MOSAIC_FUZZ_SEED", "long"), range(cases))
