"""Text goldens: compare with a file of tests/golden, or write it anew under MOSAIC_WRITE_GOLDENS=1."""

import os
from pathlib import Path

GOLDEN = Path(__file__).parent / "golden"


def assert_golden(name: str, text: str) -> None:
    """The text equals the golden file of this name."""
    path = GOLDEN / f"{name}.txt"
    if os.environ.get("MOSAIC_WRITE_GOLDENS"):
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8"), f"differs from {path.name}; MOSAIC_WRITE_GOLDENS=1 writes it anew"
