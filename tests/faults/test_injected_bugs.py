"""Every numeric bug of the list is caught by the check. All of them, with the table of errors:
pytest -q -s -m slow tests/faults/test_injected_bugs.py
"""

import pytest

from megatron_mosaic.parity.verdict import TOLERANCE
from tests.faults.bugs.listed import BUGS, CASES
from tests.faults.bugs.pool import check_bugs

pytestmark = pytest.mark.dist

HEADER = "| bug | case | loss | gradient | parameter |\n|---|---|---|---|---|"
SOME = ("one replica not stepped", "one lost token in the divisor", "no weight decay", "a row dropped on its way")


def judge(case: str, bugs, directory) -> list[str]:
    """Rows of the table. AssertionError if the sound runtime fails, or a bug passes."""
    rows, missed = [], []
    for bug, parity in check_bugs(case, bugs, directory):
        errors = parity.loss_rel_err, parity.grad_rel_err_max, parity.parameter_rel_err_max
        rows.append(f"| {bug.name if bug else 'none'} | {case} | {' | '.join(f'{error:.0e}' for error in errors)} |")
        if (bug is None) != parity.ok:
            missed.append(f"{rows[-1]} {parity.as_dict()}")
    assert not missed, "\n".join(missed)
    return rows


def test_some_bugs_are_caught(tmp_path) -> None:
    judge("base", [bug for bug in BUGS if bug.case == "base" and bug.name in SOME], tmp_path)


def test_the_list_is_long_and_every_case_has_a_bug() -> None:
    assert len(BUGS) >= 25 and {bug.case for bug in BUGS} == set(CASES)
    assert len({(bug.name, bug.case) for bug in BUGS}) == len(BUGS)
    assert TOLERANCE == 1e-5
    assert set(SOME) <= {bug.name for bug in BUGS}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_every_bug_is_caught(case, tmp_path, capsys) -> None:
    rows = judge(case, [bug for bug in BUGS if bug.case == case], tmp_path)
    with capsys.disabled():
        print("\n" + "\n".join([HEADER, *rows]), flush=True)
