"""One saved run for all tests that load or spoil a checkpoint: each has a copy."""

import shutil
from pathlib import Path

import pytest

from tests.numerics.checkpoint_runs import SMALL_PLAN, Run, run_all, saving


@pytest.fixture(scope="session")
def saved_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`whole/` (the run) and `checkpoints/` of its steps 2 and 4."""
    directory = tmp_path_factory.mktemp("saved")
    run_all([Run(name="whole", plan=SMALL_PLAN, arguments=saving(directory))], directory)
    return directory


@pytest.fixture
def saved(saved_once: Path, tmp_path: Path) -> Path:
    """Checkpoints of steps 2 and 4, beside the run that made them."""
    shutil.copytree(saved_once, tmp_path, dirs_exist_ok=True)
    return tmp_path / "checkpoints"
