"""Pages of Markdown: their fenced blocks with marks, their links, the anchors of their headings.

A command block is fenced as `bash`. It is run, unless the line above it says where it runs:

    <!-- block: MARK: reason -->
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
OUTSIDE = ("README.md", "CONTRIBUTING.md", "examples/README.md")
PAGES = (*(ROOT / name for name in OUTSIDE), *sorted((ROOT / "docs").glob("*.md")))

# Mark -> when such a block is run.
MARKS = {
    "slow": "by `-m slow`",
    "suite": "never by itself: the suite that runs this test runs the same tests",
    "gpu": "where nvidia-smi finds a GPU",
    "slurm": "where sinfo answers",
    "megatron-lm": "where $MEGATRON_LM names a checkout",
}
LANGUAGES = {"bash", "text", "yaml", "python"}

_FENCE = re.compile(r"^(?P<indent> *)```(?P<language>[\w-]*)\s*$")
_MARK = re.compile(r"^<!-- block: (?P<mark>[\w-]+): (?P<reason>\S.*) -->$")
_LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)|<(?:img|a)\s[^>]*(?:src|href)=\"([^\"]+)\"")
_HEADING = re.compile(r"^#{1,6} (.+?)\s*$")


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """A fenced block. `line`: that of its fence; `mark`: empty where the block is run always."""

    page: str
    line: int
    language: str
    text: str
    mark: str
    reason: str

    @property
    def where(self) -> str:
        """`page:line`."""
        return f"{self.page}:{self.line}"


def read_blocks(text: str, page: str) -> list[Block]:
    """All fenced blocks of a page, in order."""
    lines = text.splitlines()
    blocks, number = [], 0
    while number < len(lines):
        opened = _FENCE.match(lines[number])
        if not opened:
            number += 1
            continue
        closed = next(i for i in range(number + 1, len(lines)) if lines[i].strip() == "```")
        above = _MARK.match(lines[number - 1]) if number else None
        blocks.append(
            Block(
                page=page,
                line=number + 1,
                language=opened["language"],
                text="\n".join(line.removeprefix(opened["indent"]) for line in lines[number + 1 : closed]),
                mark=above["mark"] if above else "",
                reason=above["reason"] if above else "",
            )
        )
        number = closed + 1
    return blocks


def blocks_of(path: Path) -> list[Block]:
    """Fenced blocks of a file of this repository."""
    return read_blocks(path.read_text(encoding="utf-8"), path.relative_to(ROOT).as_posix())


def prose_of(text: str) -> list[tuple[int, str]]:
    """(line number, line) outside of fenced blocks, without inline code."""
    kept, inside = [], False
    for number, line in enumerate(text.splitlines(), start=1):
        if line.lstrip().startswith("```"):
            inside = not inside
        elif not inside:
            kept.append((number, re.sub(r"`[^`]*`", "", line)))
    return kept


def links_of(text: str) -> list[tuple[int, str]]:
    """(line number, target) of every link and picture."""
    found = [(number, match) for number, line in prose_of(text) for match in _LINK.findall(line)]
    return [(number, plain or html) for number, (plain, html) in found]


def anchors_of(text: str) -> set[str]:
    """Anchors of the headings, as GitHub names them: lower case, no punctuation, `-` for a space, `-1` for a twin."""
    anchors: set[str] = set()
    inside = False
    for line in text.splitlines():
        inside ^= line.lstrip().startswith("```")
        heading = None if inside else _HEADING.match(line)
        if not heading:
            continue
        words = re.sub(r"[^\w\- ]", "", heading[1].lower().strip()).replace(" ", "-")
        twin, name = 0, words
        while name in anchors:
            twin, name = twin + 1, f"{words}-{twin + 1}"
        anchors.add(name)
    return anchors
