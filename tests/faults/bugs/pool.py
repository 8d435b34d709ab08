"""Trains a plan again and again in one world of forked ranks, each time with another bug, and compares each time.

The reference of a case runs once: what the check needs of it does not depend on the bug.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from megatron_mosaic.any2any import pretrain
from megatron_mosaic.launch.forked import run_forked, with_command_line
from megatron_mosaic.parallel_state_ext.rebound import cpu, guard
from megatron_mosaic.parity import reference_run
from megatron_mosaic.parity.check import in_fp32, require_checkable, words_of_ranks, words_of_reference
from megatron_mosaic.parity.compare import compare
from megatron_mosaic.parity.verdict import Parity
from megatron_mosaic.plan.workload_file import format_workload
from megatron_mosaic.runtime.flags.mosaic import PLAN_VARIABLE
from tests.faults.bugs.catalogue import CASES, Bug
from tests.forked import free_port
from tests.numerics.checkpoint_runs import enter_world, forget_run

STEPS = 2


def check_bugs(case_name: str, bugs: Sequence[Bug], directory: Path) -> Iterator[tuple[Bug | None, Parity]]:
    """What a check of the case says of each bug; first, without any."""
    cpu.install()
    case = CASES[case_name]
    plan, words = in_fp32(case.plan), list(case.words)
    if case.workload is not None:
        (directory / "model.yaml").write_text(format_workload(case.workload))
        words += ["--workload", str(directory / "model.yaml")]
    require_checkable(plan, words, steps=STEPS)
    alone = directory / "reference"
    alone.mkdir()
    for measure_rounding in (False, True):
        main = (reference_run.main, str(alone), measure_rounding)
        command = words_of_reference(plan, STEPS, words)
        run_forked(1, with_command_line, command, *main, env={PLAN_VARIABLE: ""})
    planted = (None, *bugs)
    places = [directory / f"{number:02d}" for number in range(len(planted))]
    commands = []
    for place in places:
        shutil.copytree(alone, place)
        commands.append(words_of_ranks(plan, STEPS, words, str(place)))
    ports = [free_port() for _ in planted]
    unguarded = {guard.VARIABLE: "0"}  # with fingerprints, some would be found before they change a number
    run_forked(plan.world_size, _train_all, plan.world_size, planted, commands, ports, env=unguarded)
    for bug, place in zip(planted, places, strict=True):
        yield bug, compare(plan, STEPS, place)


def _train_all(
    world_size: int, planted: Sequence[Bug | None], commands: Sequence[list[str]], ports: Sequence[int]
) -> None:
    """On a rank: one run after the other."""
    for bug, words, port in zip(planted, commands, ports, strict=True):
        enter_world(world_size, port)
        print(f"bug: {bug.name if bug else 'none'}", flush=True)
        with pytest.MonkeyPatch.context() as patch:
            if bug is not None:
                bug.plant(patch)
            assert not with_command_line(words, pretrain.train), os.environ["RANK"]
            forget_run()
