"""The README is short, and pictures show what the simulator says today."""

import re
import subprocess
import sys

import pytest

from megatron_mosaic.schedules import SCHEDULES
from tests.docs.pages import ROOT

MAX_LINES = 150


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= MAX_LINES


@pytest.mark.parametrize(("picture", "panels"), [("step", 4), ("schedules", 6)])
def test_the_pictures_are_up_to_date(picture, panels):
    command = [sys.executable, str(ROOT / "scripts" / "draw_step.py"), "--stdout", picture]
    drawn = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, env={"PYTHONPATH": str(ROOT)})
    kept = (ROOT / "docs" / "figures" / f"{picture}.svg").read_text(encoding="utf-8")
    times = re.compile(r"[\d.]+ m?s(?:, [+-]\d+%)?(?=</text>)")
    assert times.findall(kept) == times.findall(drawn.stdout) and len(times.findall(kept)) == panels
    assert kept == drawn.stdout, "python scripts/draw_step.py draws it anew"


def test_every_schedule_has_its_drawing():
    kept = (ROOT / "docs" / "figures" / "schedules.svg").read_text(encoding="utf-8")
    drawn = set(re.findall(r'font-weight="600">(\w+)<', kept))
    assert drawn == SCHEDULES.keys()
