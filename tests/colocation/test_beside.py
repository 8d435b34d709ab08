"""Modules beside each other in real training steps: what they compute is what they compute in turns, to the bit.

The oracle is the same plan with `--mosaic-quota-backend none`: same groups, same threads, one action after the other.
Ranks are forked from this process, so what is patched here is what they run: every lane sleeps at random before each
action.
"""

import json
import random
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_mosaic.errors import RankFailure
from megatron_mosaic.launch.forked import run_forked, with_command_line
from megatron_mosaic.parallel_state_ext import scope
from megatron_mosaic.parallel_state_ext.grids import Grids
from megatron_mosaic.parallel_state_ext.rebound import cpu
from megatron_mosaic.parity.check import check_plan
from megatron_mosaic.plan import Layout, Plan, Recompute
from megatron_mosaic.plan.workload import Edge, Role, Workload
from megatron_mosaic.plan.workload_file import format_workload
from megatron_mosaic.runtime import train
from megatron_mosaic.runtime.dumps.reader import read_gradients
from megatron_mosaic.runtime.lane_runner import LaneRunner
from tests.cases import make_plan
from tests.colocation.beside_cases import ONE_RANK, TWO_RANKS, beside
from tests.numerics.parity_cases import any2any_plan, split_over_tp, written
from tests.worlds import BACKBONE, ITEM_TOKENS, WIDTH, module

pytestmark = pytest.mark.dist

STEPS = 100
DROPOUT = ["--hidden-dropout", "0.1", "--attention-dropout", "0.1"]


@pytest.fixture
def sleepy_lanes(monkeypatch) -> None:
    """A random pause at every switch between lanes."""
    perform, draw = LaneRunner.perform, random.Random(11)

    def sleep_and_perform(self, action, clock):
        time.sleep(draw.random() * 2e-3)
        return perform(self, action, clock)

    monkeypatch.setattr(LaneRunner, "perform", sleep_and_perform)


def train_with(backend: str, plan: Plan, directory: Path, steps: int, *words: str) -> Path:
    """A training run with this quota backend; its directory."""
    cpu.install()
    from megatron_mosaic.any2any import pretrain

    directory.mkdir()
    command = ["--mosaic-plan", written(plan, directory), "--mosaic-quota-backend", backend]
    command += ["--mosaic-report", str(directory), "--mosaic-dump-gradients", str(directory)]
    command += ["--train-iters", str(steps), "--eval-iters", "0", "--lr", "1e-3", *words]
    run_forked(plan.world_size, with_command_line, command, pretrain.main, timeout_s=500)
    return directory


def differing(a: Path, b: Path, steps: int) -> list[str]:
    """Gradients of any step that are not equal in every bit."""

    def pairs() -> Iterator[tuple[str, bool]]:
        for step in range(steps):
            ours, theirs = read_gradients(a, step), read_gradients(b, step)
            assert ours.keys() == theirs.keys() and ours
            for name in ours:
                yield f"{name} in step {step}", np.array_equal(ours[name], theirs[name])

    return [name for name, is_equal in pairs() if not is_equal]


def overlaps(directory: Path) -> bool:
    """Whether actions of two lanes of a rank ran at the same time."""
    spans = [span for span in json.loads((directory / "timeline.json").read_text())["spans"] if span[1][0] != "~"]
    return any(a[0] == b[0] and a[1] != b[1] and a[2] < b[3] and b[2] < a[3] for a in spans for b in spans)


def assert_same_to_the_bit(plan: Plan, tmp_path: Path, steps: int, *words: str) -> None:
    turns = train_with("none", plan, tmp_path / "turns", steps, *words)
    lanes = train_with("cpu", plan, tmp_path / "beside", steps, *words)
    assert differing(turns, lanes, steps) == []
    assert (turns / "losses.jsonl").read_text() == (lanes / "losses.jsonl").read_text()
    assert overlaps(lanes) and not overlaps(turns)


@pytest.mark.filterwarnings("ignore:. tracks")
def test_gradients_beside_each_other_are_those_in_turns(tmp_path, sleepy_lanes) -> None:
    plan = replace(
        TWO_RANKS, modules={**TWO_RANKS.modules, "llm": replace(TWO_RANKS.modules["llm"], recompute=Recompute.full)}
    )
    assert_same_to_the_bit(plan, tmp_path, 3, *DROPOUT)


def test_a_plan_beside_computes_what_one_process_computes(tmp_path) -> None:
    parity = check_plan(written(TWO_RANKS, tmp_path), steps=2)
    assert parity.ok and parity.grad_rel_err_max > 0, parity.as_dict()


LAYOUTS = {
    "one rank": ONE_RANK,
    "all dp2": beside(
        any2any_plan(*[("0-1", Layout(dp=2))] * 3, world_size=2, batch=8), vision=0.3, llm=0.4, generator=0.3
    ),
    "all tp2, sequence parallel": beside(
        split_over_tp(any2any_plan(*[("0-1", Layout(tp=2))] * 3, world_size=2, batch=8)), vision=0.5, llm=0.5
    ),
    "llm pp2": beside(
        any2any_plan(("0-1", Layout(dp=2)), ("0-1", Layout(pp=2)), ("0-1", Layout(tp=2)), world_size=2, batch=8),
        vision=0.3,
        llm=0.7,
    ),
    "vision cp2, llm cp2": beside(
        any2any_plan(("0-1", Layout(cp=2)), ("0-1", Layout(cp=2)), ("0", Layout()), world_size=2, batch=8),
        vision=0.5,
        llm=0.5,
    ),
    "nested, dp3 and pp2 dp2": beside(
        any2any_plan(("0-2", Layout(dp=3)), ("0-3", Layout(pp=2, dp=2)), ("3", Layout())), vision=0.4, llm=0.6
    ),
    "generator beside": beside(
        any2any_plan(("0", Layout()), ("0-1", Layout(tp=2)), ("0-1", Layout(dp=2)), world_size=2, batch=8),
        llm=0.6,
        generator=0.4,
    ),
    "tp2 dp2 and dp4": beside(
        any2any_plan(("0-3", Layout(dp=4)), ("0-3", Layout(tp=2, dp=2)), ("0-3", Layout(dp=4))), vision=0.3, llm=0.7
    ),
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:. tracks")
@pytest.mark.parametrize("plan", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_layouts_beside_compute_what_one_process_computes(plan, tmp_path, sleepy_lanes) -> None:
    parity = check_plan(written(plan, tmp_path), steps=2)
    print(f"loss {parity.loss_rel_err:.1e}, gradients {parity.grad_rel_err_max:.1e}")
    assert parity.ok, parity.as_dict()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:. tracks")
@pytest.mark.parametrize("plan", [TWO_RANKS, LAYOUTS["all tp2, sequence parallel"]], ids=["mixed", "sp"])
def test_a_hundred_steps_beside_are_those_in_turns(plan, tmp_path, sleepy_lanes) -> None:
    assert_same_to_the_bit(plan, tmp_path, STEPS, *DROPOUT)


def two_balanced_encoders(directory: Path) -> tuple[Plan, list[str]]:
    """A made-up workload of two alike encoders, each beside the other and the backbone; the words that choose it."""
    encoders = [module(name, Role.encoder, hidden_size=32) for name in ("left", "right")]
    edges = tuple(Edge(source=e.name, target=BACKBONE, rows_per_item=ITEM_TOKENS, width=WIDTH) for e in encoders)
    workload = Workload(name="balanced", modules=(*encoders, module(BACKBONE, Role.backbone)), edges=edges)
    (directory / "model.yaml").write_text(format_workload(workload))
    layouts = dict.fromkeys(("left", "right", BACKBONE), ("0", Layout()))
    plan = make_plan(layouts, workload=workload, world_size=1, global_batch_size=8)
    return beside(plan, left=0.25, right=0.25, llm=0.5), ["--workload", str(directory / "model.yaml")]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:. tracks")
def test_two_balanced_encoders_beside_are_those_in_turns(tmp_path, sleepy_lanes) -> None:
    plan, words = two_balanced_encoders(tmp_path)
    assert_same_to_the_bit(plan, tmp_path, STEPS, *words)
    parity = check_plan(written(plan, tmp_path), steps=2, megatron_args=words)
    assert parity.ok, parity.as_dict()


# -- what must not be shared, in the real runtime --------------------------------------------------------------------


def is_wrong(plan: Plan, tmp_path: Path) -> bool:
    """Whether a run beside fails, or computes something else than in turns."""
    turns = train_with("none", plan, tmp_path / "turns", 2, *DROPOUT)
    try:
        lanes = train_with("cpu", plan, tmp_path / "beside", 2, *DROPOUT)
    except RankFailure:
        return True
    return differing(turns, lanes, 2) != []


@pytest.mark.slow
def test_shared_groups_are_wrong(tmp_path, monkeypatch, sleepy_lanes) -> None:
    make = Grids.__init__
    monkeypatch.setattr(Grids, "__init__", lambda self, view, *, timeout, apart=(): make(self, view, timeout=timeout))
    monkeypatch.setenv("MOSAIC_TIMEOUT_S", "20")
    assert is_wrong(LAYOUTS["all tp2, sequence parallel"], tmp_path)


@pytest.mark.slow
def test_a_shared_tracker_is_wrong(tmp_path, monkeypatch, sleepy_lanes) -> None:
    monkeypatch.setattr(scope, "keep_tracker_by_thread", lambda: None)
    assert is_wrong(TWO_RANKS, tmp_path)


@pytest.mark.slow
def test_shared_scratch_memory_is_wrong(tmp_path, monkeypatch, sleepy_lanes) -> None:
    from megatron.core import parallel_state

    def share() -> None:
        if parallel_state._GLOBAL_MEMORY_BUFFER is None:
            parallel_state._set_global_memory_buffer()

    monkeypatch.setattr(scope, "keep_memory_by_module", share)
    assert is_wrong(LAYOUTS["all tp2, sequence parallel"], tmp_path)


@pytest.mark.slow
def test_a_lanes_thread_without_a_generator_of_its_own_is_wrong(tmp_path, monkeypatch, sleepy_lanes) -> None:
    import contextlib

    monkeypatch.setattr(train, "lane_thread", lambda grad_enabled: contextlib.nullcontext())
    assert is_wrong(TWO_RANKS, tmp_path)
