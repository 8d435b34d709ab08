"""The pages as a site: built without a warning, and without asking another host for anything."""

import os
import re
import subprocess
import sys

from tests.docs.pages import ROOT


def test_the_site_builds_without_warnings_and_needs_no_network(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-f", str(ROOT / "mkdocs.yml")]
    environment = os.environ | {
        "NO_MKDOCS_2_WARNING": "1",
        "http_proxy": "http://127.0.0.1:9",
        "https_proxy": "http://127.0.0.1:9",
    }
    done = subprocess.run([*command, "-d", str(tmp_path)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and not done.stderr.strip(), done.stderr
    pages = sorted(tmp_path.glob("*.html"))
    built = {path.stem for path in pages} - {"index", "404"}
    assert built == {path.stem for path in (ROOT / "docs").glob("*.md")} - {"README"}
    for page in pages:
        asked = re.findall(r'<(?:script|link|img)[^>]+(?:src|href)="(https?:[^"]+)"', page.read_text())
        assert not asked, f"{page.name} asks another host"
