"""Puts the real output of the quickstart and the parity table between their markers in README.md.

bash scripts/quickstart.sh > outputs/quickstart.txt && bash scripts/parity_table.sh > outputs/parity.md
.venv/bin/python scripts/refresh_readme.py outputs/quickstart.txt outputs/parity.md
"""

import re
import sys
from pathlib import Path

README = Path(__file__).resolve().parent.parent / "README.md"


def put(text: str, marker: str, content: str) -> str:
    """The text with `content` between `<!-- marker -->` and `<!-- /marker -->`."""
    pattern = re.compile(rf"(<!-- {marker} -->\n).*?(<!-- /{marker} -->)", re.DOTALL)
    assert pattern.search(text), marker
    return pattern.sub(lambda match: f"{match[1]}{content}\n{match[2]}", text)


def main(quickstart: str, parity: str) -> None:
    shown = Path(quickstart).read_text(encoding="utf-8")
    shown = "\n".join(line.rstrip() for line in shown[shown.index("== calibrate") :].splitlines())
    text = put(README.read_text(encoding="utf-8"), "quickstart-output", f"```text\n{shown}\n```")
    text = put(text, "parity-table", Path(parity).read_text(encoding="utf-8").strip())
    README.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
