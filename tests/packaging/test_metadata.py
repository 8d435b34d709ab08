"""What the package says of itself, in all places that say it."""

import tomllib
from pathlib import Path

import yaml

import megatron_mosaic

ROOT = Path(__file__).resolve().parents[2]


def test_one_version_everywhere():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"]
    changes = [line for line in (ROOT / "CHANGELOG.md").read_text().splitlines() if line.startswith("## ")]
    assert cited == megatron_mosaic.__version__
    assert changes[0].startswith(f"## {cited}"), "the newest section of CHANGELOG.md"
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dynamic"] == ["version"]


def test_types_are_part_of_the_package():
    assert (ROOT / "megatron_mosaic" / "py.typed").is_file()


def test_hooks_run_what_ci_runs():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    stages = (ROOT / "scripts" / "test.sh").read_text()
    for hook in hooks:
        program, *words = hook["entry"].removeprefix(".venv/bin/").split()
        assert " ".join([program, *words]) in stages, hook["id"]
