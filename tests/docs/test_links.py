"""Links of all Markdown pages lead somewhere: files that git knows, headings that exist, pictures that are there."""

import subprocess
from functools import cache
from pathlib import Path

import pytest

from tests.docs.pages import ROOT, anchors_of, links_of


@cache
def files_of_git() -> frozenset[Path]:
    """Files that a clone has or will have."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: nothing says which files are sources")
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return frozenset(ROOT / name for name in listed.split("\0") if name and (ROOT / name).is_file())


def dead_links(text: str, page: Path) -> list[str]:
    """`line: target` of the links of a page that lead nowhere. What lies on the network is not asked for."""
    dead = []
    for number, target in links_of(text):
        if target.startswith(("https://", "http://", "mailto:")):
            continue
        name, _, anchor = target.partition("#")
        there = (page.parent / name).resolve() if name else page
        is_folder = any(there in each.parents for each in files_of_git())
        if there not in files_of_git() and not is_folder and name:
            dead.append(f"{number}: {target}")
        elif anchor and there.suffix == ".md":
            known = anchors_of(text if there == page else there.read_text(encoding="utf-8"))
            if anchor not in known:
                dead.append(f"{number}: {target}, of {sorted(known)}")
    return dead


def test_no_link_is_dead():
    pages = [path for path in files_of_git() if path.suffix == ".md"]
    assert len(pages) > 20
    found = {path.relative_to(ROOT).as_posix(): dead_links(path.read_text(encoding="utf-8"), path) for path in pages}
    assert not {page: dead for page, dead in found.items() if dead}


@pytest.mark.parametrize(
    ("text", "dead"),
    [
        ("[a](README.md) and [b](docs/plans.md#plans) and [c](docs)", 0),
        ("[a](READYOU.md)", 1),
        ("![a](docs/none.svg)", 1),
        ('<img src="docs/none.svg">', 1),
        ("[a](docs/plans.md#plants)", 1),
        ("# One thing, two\n[a](#one-thing-two)", 0),
        ("# One\n# One\n[a](#one-1) [b](#one-2)", 1),
        ("```\n# One\n[x](nowhere.md)\n```\n[a](#one)", 1),
        ("`[a](nowhere.md)`", 0),
    ],
)
def test_what_a_dead_link_is(text, dead):
    assert len(dead_links(text, ROOT / "PAGE.md")) == dead


def test_the_index_of_docs_names_every_page():
    named = {target for _, target in links_of((ROOT / "docs" / "README.md").read_text(encoding="utf-8"))}
    missing = {path.name for path in (ROOT / "docs").glob("*.md")} - named - {"README.md"}
    assert not missing, f"docs/README.md has no line for {sorted(missing)}"
