"""Dropout through the whole of `pretrain()`: recomputation may keep fewer activations, and nothing else.

The same plan with `recompute: none`, `selective`, `full` and `whole` has to train on the same masks, so losses and
gradients are equal in every bit. A control shows that the masks matter.
"""

import json
from dataclasses import replace

import numpy as np
import pytest

from megatron_mosaic.launch.forked import run_forked, with_command_line
from megatron_mosaic.parallel_state_ext.rebound import cpu
from megatron_mosaic.plan import Layout, Recompute
from megatron_mosaic.runtime.dumps.reader import read_gradients
from tests.numerics import parity_cases as cases

pytestmark = pytest.mark.dist

STEPS = 2
DROPOUT = ["--hidden-dropout", "0.1", "--attention-dropout", "0.1"]
STEADY = ["--train-iters", str(STEPS), "--eval-iters", "0", "--lr", "1e-3", "--lr-warmup-fraction", "0.0"]
# tp, pp and dp, modules that share ranks: streams are swapped at every action.
PLAN = cases.any2any_plan(("0-1", Layout(dp=2)), ("0-1", Layout(tp=2)), ("0-1", Layout(pp=2)), world_size=2, batch=4)


def train(plan, directory, *arguments) -> tuple[list[dict[str, float]], list[dict[str, np.ndarray]]]:
    """Losses and whole gradients of each step."""
    cpu.install()
    from megatron_mosaic.any2any import pretrain

    directory.mkdir()
    command = ["--mosaic-plan", cases.written(plan, directory), "--mosaic-report", str(directory)]
    command += ["--mosaic-dump-gradients", str(directory), *STEADY, *arguments]
    run_forked(plan.world_size, with_command_line, command, pretrain.main)
    losses = [json.loads(line) for line in (directory / "losses.jsonl").read_text().splitlines()]
    assert len(losses) == STEPS
    return losses, [read_gradients(directory, step) for step in range(STEPS)]


def recomputing(kind: Recompute):
    return replace(PLAN, modules={name: replace(m, recompute=kind) for name, m in PLAN.modules.items()})


def test_recomputation_repeats_the_dropout_masks(tmp_path) -> None:
    losses, gradients = train(recomputing(Recompute.none), tmp_path / "none", *DROPOUT)
    for kind in (Recompute.selective, Recompute.full, Recompute.whole):
        again, others = train(recomputing(kind), tmp_path / kind.value, *DROPOUT)
        assert again == losses, kind
        for step in range(STEPS):
            assert others[step].keys() == gradients[step].keys()
            differing = [
                name for name, value in gradients[step].items() if not np.array_equal(others[step][name], value)
            ]
            assert not differing, (kind, step, differing)
    dry, _ = train(PLAN, tmp_path / "dry")
    assert dry != losses, "dropout did nothing"
