"""Puts the real output of the quickstart and the parity table between their markers in docs/, and draws the step.

bash scripts/quickstart.sh > outputs/quickstart.txt && bash scripts/parity_table.sh > outputs/parity.md
.venv/bin/python scripts/refresh_docs.py outputs/quickstart.txt outputs/parity.md
"""

import re
import sys
from pathlib import Path

import draw_step

DOCS = Path(__file__).resolve().parent.parent / "docs"


def put(page: str, marker: str, content: str) -> None:
    """Write `content` between `<!-- marker -->` and `<!-- /marker -->` of a page."""
    path = DOCS / page
    pattern = re.compile(rf"(<!-- {marker} -->\n).*?(<!-- /{marker} -->)", re.DOTALL)
    text = path.read_text(encoding="utf-8")
    assert pattern.search(text), marker
    path.write_text(pattern.sub(lambda match: f"{match[1]}{content}\n{match[2]}", text), encoding="utf-8")


def main(quickstart: str, parity: str) -> None:
    shown = Path(quickstart).read_text(encoding="utf-8")
    shown = "\n".join(line.rstrip() for line in shown[shown.index("== calibrate") :].splitlines())
    put("getting-started.md", "quickstart-output", f"```text\n{shown}\n```")
    draw_step.write()
    put("parity.md", "parity-table", Path(parity).read_text(encoding="utf-8").strip())


if __name__ == "__main__":
    main(*sys.argv[1:])
