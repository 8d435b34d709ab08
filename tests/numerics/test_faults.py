"""A training run in which a rank fails: the error names rank, lane and action, and no process survives it."""

import os
import signal

import psutil
import pytest
import torch.distributed as dist

from megatron_mosaic.colocation.executor import Executor
from megatron_mosaic.errors import RankFailure
from megatron_mosaic.parity.check import check_plan
from tests.numerics import parity_cases as cases
from tests.numerics.parity_cases import written

pytestmark = pytest.mark.dist

PLAN = cases.any2any_plan(("0-1", cases.Layout(dp=2)), ("0-2", cases.Layout(dp=3)), ("2", cases.Layout()), world_size=3)


@pytest.fixture
def in_action(monkeypatch):
    """in_action(rank, step, action, fail): run `fail` on that rank when it comes to that action."""

    def patch(rank: int, step: int, wanted: str, fail) -> None:
        sound = Executor.run

        def run(self, program, perform):
            def perform_or_fail(action, clock):
                if (dist.get_rank(), self.step, str(action)) == (rank, step, wanted):
                    fail()
                return perform(action, clock)

            sound(self, program, perform_or_fail)

        monkeypatch.setattr(Executor, "run", run)

    return patch


def failure_of(tmp_path) -> RankFailure:
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    with pytest.raises(RankFailure) as failure:
        check_plan(written(PLAN, tmp_path), steps=3)
    left = {child.pid for child in psutil.Process().children(recursive=True)} - before
    assert not left, f"processes left behind: {left}"
    return failure.value


def test_a_rank_that_raises_is_named_with_lane_and_action(tmp_path, in_action) -> None:
    def fail() -> None:
        raise FloatingPointError("made up by a test")

    in_action(2, 1, "llm.0B1", fail)
    failure = failure_of(tmp_path)
    assert failure.where == "rank 2, step 1 lane llm.0 action llm.0B1 failed: FloatingPointError"
    assert "FloatingPointError: made up by a test" in failure.got


def test_a_rank_that_is_killed_is_named_with_lane_and_action(tmp_path, in_action) -> None:
    in_action(1, 2, "vision.0F1", lambda: os.kill(os.getpid(), signal.SIGKILL))
    failure = failure_of(tmp_path)
    assert failure.where == "rank 1, step 2 lane vision.0 action vision.0F1"
    assert failure.got.startswith("killed by SIGKILL\n")


def test_a_rank_that_fails_in_the_optimizer_is_named(tmp_path, monkeypatch) -> None:
    from megatron_mosaic.parallel_state_ext.optimizers import module_optimizers as optimizer

    clip = optimizer.clip_grad_by_total_norm_fp32

    def fail(*args) -> None:
        if dist.get_rank() == 0:
            raise MemoryError("made up by a test")
        clip(*args)

    monkeypatch.setattr(optimizer, "clip_grad_by_total_norm_fp32", fail)
    failure = failure_of(tmp_path)
    assert failure.where == "rank 0, step 1 lane ~optimizer action ~optimizer failed: MemoryError"
