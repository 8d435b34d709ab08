"""Every layout of the acceptance table computes what one process does: losses, every gradient, 3 steps, 1e-5."""

import os
from pathlib import Path

import pytest

from megatron_mosaic.parallel_state_ext.rebound import guard
from megatron_mosaic.parity.check import check_plan
from megatron_mosaic.plan.plan_file import save_plan
from megatron_mosaic.plan.workload_file import format_workload
from tests.numerics.acceptance_cases import CASES, Case
from tests.numerics.schedule_cases import ALWAYS, SLOW, UNGUARDED

pytestmark = pytest.mark.dist


def check_case(case: Case, directory: Path):
    """The parity of a case, run in `directory`."""
    save_plan(case.plan, directory / "plan.yaml")
    (directory / "model.yaml").write_text(format_workload(case.workload))
    args = ["--workload", str(directory / "model.yaml"), *case.args]
    return check_plan(str(directory / "plan.yaml"), steps=3, megatron_args=args)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_layout(case, tmp_path) -> None:
    parity = check_case(case, tmp_path)
    assert parity.ok, parity.as_dict()
    assert parity.grad_rel_err_max > 0, "no rounding at all: was anything computed?"
    if case.group == "2.7.6":
        assert parity.empty_units_by_module["image"] > 0, "no lane was ever without an image"


@pytest.mark.parametrize(
    "case", [*ALWAYS, *[pytest.param(case, marks=pytest.mark.slow) for case in SLOW]], ids=lambda case: case.id
)
def test_schedule(case, tmp_path) -> None:
    parity = check_case(case, tmp_path)
    assert parity.ok, parity.as_dict()
    assert parity.grad_rel_err_max > 0, "no rounding at all: was anything computed?"


@pytest.mark.parametrize(
    "case",
    [
        case if case in UNGUARDED else pytest.param(case, marks=pytest.mark.slow)
        for case in dict.fromkeys([*UNGUARDED, *CASES, *ALWAYS, *SLOW])
    ],
    ids=lambda case: case.id,
)
def test_without_guard(case, tmp_path, monkeypatch) -> None:
    """As users train: messages carry no fingerprints, so they have to come in the order in which they are expected."""
    monkeypatch.setenv(guard.VARIABLE, "0")
    parity = check_case(case, tmp_path)
    assert parity.ok, parity.as_dict()


def test_table_has_every_group() -> None:
    groups = {case.group.split()[0] for case in CASES}
    assert groups >= {"2.1", "2.2", "2.3", "2.4a", "2.4b", "2.4c", "2.5a", "2.5b", "2.6"}
    assert groups >= {f"2.7.{n}" for n in range(1, 11)}
    assert max(case.plan.world_size for case in CASES) == 8
    assert len({case.id for case in CASES}) == len(CASES)
    assert os.environ.get("WORLD_SIZE") is None, "a rank's environment leaked into the tests"
