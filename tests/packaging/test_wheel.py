"""The wheel in a fresh environment outside of the repository, as someone without a checkout has it.

With the planner's light dependencies, torch absent; with `MOSAIC_WHEEL_FULL=1` also with all of them, which downloads
gigabytes.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LIGHT = ("numpy", "scipy", "hydra-core", "pydantic", "pyyaml", "rich")  # as docs/getting-started.md says
PYENV = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
PLAN = """\
mosaic_plan: 1
workload: any2any-digits
world_size: 2
global_batch_size: 8
micro_batch_size: 2
schedule: 1f1b
modules:
  vision: {ranks: 0, layout: {dp: 1}}
  llm: {ranks: 0-1, layout: {pp: 2}}
  generator: {ranks: 1, layout: {dp: 1}}
"""


def run(*words: str | Path, directory: Path) -> str:
    """What a command printed on stdout, run outside of the repository with none of its settings."""
    kept = {"PATH", "HOME", "LANG", "TMPDIR"}
    environment: Mapping[str, str] = {
        key: value
        for key, value in os.environ.items()
        if key in kept or key.startswith(("PIP_", "SSL_", "http", "HTTP"))
    }
    done = subprocess.run([str(word) for word in words], cwd=directory, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{words} ended with status {done.returncode}:\n{done.stdout}\n{done.stderr}"
    return done.stdout


def python_of(minor: int) -> str:
    """An ordinary Python 3.`minor`; the test is skipped where there is none."""
    named = [*PYENV.glob(f"3.{minor}.*/bin/python3"), shutil.which(f"python3.{minor}")]
    for each in ([sys.executable] if sys.version_info[:2] == (3, minor) else []) + [str(one) for one in named if one]:
        if subprocess.run([each, "-c", "import venv, ensurepip"], capture_output=True).returncode == 0:
            return each
    pytest.skip(f"no Python 3.{minor} is installed")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", directory, ROOT, directory=directory)
    (built,) = directory.glob("*.whl")
    return built


def install(minor: int, directory: Path, *packages: str | Path) -> Path:
    """A new environment with these packages; its folder of programs."""
    run(python_of(minor), "-m", "venv", directory / "env", directory=directory)
    programs = directory / "env" / "bin"
    pip = (programs / "python", "-m", "pip", "install", "-q", "-c", ROOT / "constraints.txt")
    for words in packages:
        run(*pip, *str(words).split(), directory=directory)
    return programs


@pytest.mark.slow
def test_the_wheel_holds_what_the_package_reads(wheel, tmp_path):
    shutil.unpack_archive(wheel, tmp_path, "zip")
    packed = {path.relative_to(tmp_path).as_posix() for path in (tmp_path / "megatron_mosaic").rglob("*")}
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "megatron_mosaic"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert {name for name in listed.split("\0") if name and (ROOT / name).is_file()} <= packed
    (metadata,) = tmp_path.glob("*.dist-info/METADATA")
    assert "# megatron_mosaic" in metadata.read_text(), "the README is the package's description"


@pytest.mark.slow
@pytest.mark.parametrize("minor", [12, 13])
def test_the_planner_works_without_torch(minor, wheel, tmp_path):
    programs = install(minor, tmp_path, f"--no-deps {wheel}", " ".join(LIGHT))
    assert "no torch" in run(programs / "mosaic", "--version", directory=tmp_path)
    words = ("model=vlm_7b", "cluster=h100_1x8")
    planned = json.loads(run(programs / "mosaic", "plan", *words, "--out", "plan.yaml", "--json", directory=tmp_path))
    assert planned["predicted"]["step_s"] > 0
    for command in (["show"], ["simulate"], ["report", "--no-search"]):
        run(programs / "mosaic", command[0], "plan.yaml", *command[1:], directory=tmp_path)
    run(programs / "mosaic", "compare", *words, "search.max_tp=1", directory=tmp_path)
    run(programs / "mosaic", "validate", directory=tmp_path)
    refused = subprocess.run(
        [programs / "mosaic", "train", "plan.yaml"], cwd=tmp_path, capture_output=True, text=True, env={}
    )
    assert refused.returncode == 2 and "got:      no package" in refused.stderr, refused.stderr


@pytest.mark.slow
@pytest.mark.skipif(not os.environ.get("MOSAIC_WHEEL_FULL"), reason="downloads gigabytes: set MOSAIC_WHEEL_FULL=1")
@pytest.mark.parametrize("minor", [12, 13])
def test_the_runtime_works_from_the_wheel(minor, wheel, tmp_path):
    programs = install(minor, tmp_path, f"{wheel}[demo]")
    (tmp_path / "plan.yaml").write_text(PLAN)
    assert json.loads(run(programs / "mosaic", "check", "plan.yaml", "--json", directory=tmp_path))["ok"] is True
