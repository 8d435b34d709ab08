"""What must hold of the repository as a whole: its entry points, its public names, its import weight, its sizes.

These are the promises no unit test of a module can see. The import contracts stand in pyproject.toml.
"""

import ast
import importlib
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import megatron_mosaic

ROOT = Path(__file__).resolve().parents[2]

# The public API, frozen: a name enters or leaves in a commit that says so, and here.
PUBLIC_NAMES = [
    "Cluster",
    "GpuType",
    "Layout",
    "Link",
    "ModuleConfig",
    "ModulePlan",
    "MosaicError",
    "Plan",
    "RankSet",
    "Schedule",
    "Timeline",
    "Workload",
    "load_plan",
    "save_plan",
    "validate_plan",
]
MAX_PUBLIC_NAMES = 15

# The planner side of the package: it starts without torch or Megatron, on a laptop.
LIGHT_MODULES = [
    "megatron_mosaic",
    "megatron_mosaic.plan.plan",
    "megatron_mosaic.schedules.schedule",
    "megatron_mosaic.config",
    "megatron_mosaic.cost_model",
    "megatron_mosaic.search",
    "megatron_mosaic.cli",
    "megatron_mosaic.any2any.arguments",
    "megatron_mosaic.parity.check",
]

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 80
# Exceptions to the two limits, "path" or "path::function" -> its length. They may only shrink: an entry that is longer
# than its number, or that has come down to the limit, fails.
TOO_LONG: dict[str, int] = {}

# Built from pieces, so that this file does not name what it refuses.
MACHINE_PATH = re.compile(r"(?<![\w.~}])/(?:" + "|".join(["tmp", "work", "root", "home"]) + r")(?![\w-])")
REGISTRY = re.compile(
    "|".join([r"pypi\." + r"(?:org|nvidia)", "python" + "hosted", r"download\." + "pytorch", "index" + "[-_]url"]),
    re.IGNORECASE,
)


@cache
def repo_files() -> tuple[Path, ...]:
    """Every file git tracks or would track, so that ignored environments and outputs are left out."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: nothing says which files are sources")
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    files = tuple(ROOT / name for name in sorted(set(listed.split("\0"))) if name and (ROOT / name).is_file())
    assert Path(__file__).resolve() in files, "git ls-files does not see the tests"
    return files


def text_of(path: Path) -> str | None:
    """The file's text, or None for a binary file."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return None


def lengths_of(path: Path) -> dict[str, int]:
    """Lines of a Python file ("path") and of every function in it ("path::Class.function")."""
    text = path.read_text(encoding="utf-8")
    name = path.relative_to(ROOT).as_posix()
    lengths = {name: len(text.splitlines())}

    def visit(node: ast.AST, scope: tuple[str, ...]) -> None:
        for child in ast.iter_child_nodes(node):
            inner = scope
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                inner = (*scope, child.name)
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                key = f"{name}::{'.'.join(inner)}"
                length = child.end_lineno - child.lineno + 1
                lengths[key] = max(length, lengths.get(key, 0))
            visit(child, inner)

    visit(ast.parse(text, filename=name), ())
    return lengths


def limit_of(key: str) -> int:
    return MAX_FUNCTION_LINES if "::" in key else MAX_FILE_LINES


def test_ci_calls_the_test_script_and_nothing_else() -> None:
    lines = (ROOT / ".ci" / "run").read_text().splitlines()
    assert lines[0] == "#!/usr/bin/env bash"
    commands = [line for line in lines if line.strip() and not line.lstrip().startswith("#")]
    assert commands == ['exec bash "$(dirname "${BASH_SOURCE[0]}")/../scripts/test.sh"']


@pytest.mark.parametrize("script", [".ci/run", "scripts/setup.sh", "scripts/test.sh"])
def test_entry_point_parses_and_may_be_executed(script: str) -> None:
    path = ROOT / script
    assert path.stat().st_mode & 0o111, f"{script} is not executable: chmod +x {script}"
    checked = subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr


@pytest.mark.parametrize(
    ("pattern", "what"),
    [(MACHINE_PATH, "a path of one machine"), (REGISTRY, "a package registry")],
    ids=["machine-path", "registry"],
)
def test_no_file_names_something_of_one_machine(pattern: re.Pattern[str], what: str) -> None:
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}"
        for path in repo_files()
        for number, line in enumerate((text_of(path) or "").splitlines(), start=1)
        if pattern.search(line)
    ]
    assert not found, f"these lines name {what}:\n" + "\n".join(found)


@pytest.mark.parametrize(
    ("line", "machine_path", "registry"),
    [
        ('open("/' + 'tmp/x")', True, False),
        ("cd /" + "root", True, False),
        ("see https://example.org/frame/" + "work/x", False, False),
        ("cd $" + "{HOME}/" + "work and ~/" + "tmp", False, False),
        ("/" + "workload and /" + "home-made", False, False),
        ("pip install --" + "index" + "-url x", False, True),
        ("https://" + "pypi." + "org/simple", False, True),
        ("PyPI's `apex` is another program", False, False),
    ],
)
def test_patterns_find_what_they_are_for(line: str, machine_path: bool, registry: bool) -> None:
    assert (bool(MACHINE_PATH.search(line)), bool(REGISTRY.search(line))) == (machine_path, registry)


def test_public_names_are_frozen() -> None:
    assert sorted(megatron_mosaic.__all__) == sorted(PUBLIC_NAMES)
    assert len(set(PUBLIC_NAMES)) == len(PUBLIC_NAMES) <= MAX_PUBLIC_NAMES
    missing = [name for name in PUBLIC_NAMES if not hasattr(importlib.import_module("megatron_mosaic"), name)]
    assert not missing, f"megatron_mosaic.__all__ lists names that do not import: {missing}"


@pytest.mark.parametrize("module", LIGHT_MODULES)
def test_planner_imports_neither_torch_nor_megatron(module: str) -> None:
    # A fresh interpreter: this one has imported torch already when another test needed it.
    code = f"import sys, {module}; print(*sorted({{'torch', 'megatron'}} & set(sys.modules)))"
    fresh = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert fresh.returncode == 0, fresh.stderr
    assert fresh.stdout.split() == [], f"import {module} also imports {fresh.stdout.strip()}"


def test_no_import_contract_is_switched_off() -> None:
    # import-linter refuses a contract that names a module not written yet, so such a line starts as a comment.
    commented = re.findall(r'^ *# *"(megatron_mosaic[.\w]+)",', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    paths = {name: ROOT / name.replace(".", "/") for name in commented}
    switched_off = [
        name for name, path in paths.items() if path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()
    ]
    assert not switched_off, f"these modules exist: remove the # before them in pyproject.toml: {switched_off}"


def test_files_and_functions_are_small() -> None:
    lengths: dict[str, int] = {}
    for path in repo_files():
        if path.suffix == ".py":
            lengths |= lengths_of(path)

    too_long = [
        f"{key}: {length} lines, at most {max(limit_of(key), TOO_LONG.get(key, 0))}"
        for key, length in lengths.items()
        if length > max(limit_of(key), TOO_LONG.get(key, 0))
    ]
    assert not too_long, "when one grows, a noun is hiding in it:\n" + "\n".join(too_long)

    stale = [key for key in TOO_LONG if lengths.get(key, 0) <= limit_of(key)]
    assert not stale, f"below the limit or gone; take them out of TOO_LONG: {stale}"
