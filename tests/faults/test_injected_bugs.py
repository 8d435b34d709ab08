"""Every numeric bug of the list is caught by the check. All of them, with the table of errors:
pytest -q -s -m slow tests/faults/test_injected_bugs.py
"""

import pytest

from megatron_mosaic.errors import RankFailure
from megatron_mosaic.parallel_state_ext import scope
from megatron_mosaic.parity.verdict import TOLERANCE
from tests.faults.bugs.listed import BUGS, CASES
from tests.faults.bugs.pool import check_bugs
from tests.parallel_state_ext import test_dropout

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


def same_seed_on_all_replicas(patch: pytest.MonkeyPatch) -> None:
    seed_of = scope.stream_seed
    patch.setattr(scope, "stream_seed", lambda seed, module, *, pp, dp, cp: seed_of(seed, module, pp=pp, dp=0, cp=cp))


def same_stream_for_all_modules(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(scope, "stream_seed", lambda seed, module, *, pp, dp, cp: seed + 1000 * pp + 100 * dp + 10 * cp)


WRONG_STREAMS = {  # a check refuses what draws random numbers: these are for a test of their own
    "replicas draw the same dropout": same_seed_on_all_replicas,
    "modules draw the same dropout": same_stream_for_all_modules,
}


@pytest.mark.slow
@pytest.mark.parametrize("plant", WRONG_STREAMS.values(), ids=WRONG_STREAMS)
def test_a_wrong_random_stream_is_caught_by_its_own_test(plant, monkeypatch) -> None:
    plant(monkeypatch)
    with pytest.raises(RankFailure, match="AssertionError"):
        test_dropout.test_masks_are_equal_on_tp_replicas_and_nowhere_else()
