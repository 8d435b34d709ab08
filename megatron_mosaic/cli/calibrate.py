"""`mosaic calibrate`: this machine as a profile."""

from __future__ import annotations

import argparse
import os
import time

from megatron_mosaic.cli.output import print_json, print_progress
from megatron_mosaic.cli.runtime import import_runtime
from megatron_mosaic.cost_model.profile import default_profile_path, save_profile


def main(arguments: argparse.Namespace) -> int:
    """Measure, write the profile, say where it is."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    started = time.perf_counter()
    import_runtime()
    from megatron_mosaic.calibrate import calibrate

    profile = calibrate(progress=lambda text: print_progress(f"calibrate: {text} ..."))
    path = arguments.out or default_profile_path()
    save_profile(profile, path)
    seconds = time.perf_counter() - started
    if arguments.json:
        print_json({"profile": str(path), "seconds": seconds})
    else:
        print(f"{profile.title}: {profile.machine.cores} cores, written to {path} in {seconds:.0f} s")
    return 0
