"""The README is short, and its picture is what the simulator says today."""

import re
import subprocess
import sys

from tests.docs.pages import ROOT

MAX_LINES = 150


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= MAX_LINES


def test_the_picture_of_the_step_is_up_to_date():
    command = [sys.executable, str(ROOT / "scripts" / "draw_step.py"), "--stdout"]
    drawn = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, env={"PYTHONPATH": str(ROOT)})
    kept = (ROOT / "docs" / "figures" / "step.svg").read_text(encoding="utf-8")
    times = re.compile(r"[\d.]+ m?s(?:, [+-]\d+%)?(?=</text>)")
    assert times.findall(kept) == times.findall(drawn.stdout) and len(times.findall(kept)) == 4
    assert kept == drawn.stdout, "python scripts/draw_step.py draws it anew"
