"""SIGTERM at the `mosaic` command: temporary files are removed, and whoever calls `main` keeps his own handler."""

import os
import signal
import subprocess
import sys
import threading
import time

from megatron_mosaic.cli.main import main


def test_sigterm_removes_temporary_directories(tmp_path):
    code = (
        "import sys, tempfile, time; from megatron_mosaic.cli import main; from megatron_mosaic.cli import show\n"
        "def wait(_):\n"
        "    with tempfile.TemporaryDirectory(dir=sys.argv[1]): time.sleep(60)\n"
        "show.main = wait; sys.exit(main(['show', 'plan.yaml']))"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)])
    while not os.listdir(tmp_path) and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 143
    assert os.listdir(tmp_path) == []


def test_the_handler_of_sigterm_is_put_back():
    before = signal.getsignal(signal.SIGTERM)
    assert main(["show", "missing.yaml"]) == 2
    assert signal.getsignal(signal.SIGTERM) is before
    found = []
    thread = threading.Thread(target=lambda: found.append(main(["show", "missing.yaml"])))  # may not set handlers
    thread.start()
    thread.join()
    assert found == [2]
