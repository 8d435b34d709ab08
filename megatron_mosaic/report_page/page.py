"""The page itself: a template, a style sheet, scripts and the data, all in one file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from html import escape
from importlib.resources import files
from typing import Any

SCRIPTS = ("shapes", "rank_map", "gantt", "memory", "searched", "run", "start")  # in the order they need each other
DIGITS = 6  # of a number on the page


def render_page(title: str, sections: Mapping[str, Any]) -> str:
    """HTML text. `sections`: name -> what its script draws; `start.js` leaves out those that are absent."""
    static = files("megatron_mosaic.report_page") / "static"
    parts = {
        "title": escape(title),
        "style": (static / "page.css").read_text(encoding="utf-8"),
        "data": encode({"title": title, **sections}),
        "scripts": "\n".join((static / f"{name}.js").read_text(encoding="utf-8") for name in SCRIPTS),
    }
    page = (static / "page.html").read_text(encoding="utf-8")
    for name, text in parts.items():
        before, mark, after = page.partition(f"%{name}%")
        assert mark, name
        page = before + text + after
    return page


def encode(data: Any) -> str:
    """JSON that may stand inside `<script>`: no name of a module or a plan can end the element."""
    text = json.dumps(_rounded(data), separators=(",", ":"), allow_nan=False, ensure_ascii=False)
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _rounded(value: Any) -> Any:
    """Floats with six digits, which is more than a screen shows."""
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}")
    if isinstance(value, Mapping):
        return {key: _rounded(inner) for key, inner in value.items()}
    return [_rounded(inner) for inner in value] if isinstance(value, (list, tuple)) else value
