"""`mosaic calibrate`: this machine as a profile."""

from __future__ import annotations

import argparse
import os
import time

from megatron_mosaic.cli.output import print_json, print_progress
from megatron_mosaic.cli.runtime import import_runtime
from megatron_mosaic.config import LocalClusterSection, compose_sections
from megatron_mosaic.cost_model.profile import default_profile_path, save_profile
from megatron_mosaic.errors import ConfigError


def main(arguments: argparse.Namespace) -> int:
    """Measure, write the profile, say where it is."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    started = time.perf_counter()
    cluster = compose_sections(arguments.overrides).cluster
    if not isinstance(cluster, LocalClusterSection):
        raise ConfigError("cluster", got=cluster.name, expected="local: this machine is measured", fix="leave it out")
    num_ranks = max(2, cluster.num_ranks)
    import_runtime()
    from megatron_mosaic.calibrate import calibrate

    profile = calibrate(num_ranks=num_ranks, progress=lambda text: print_progress(f"calibrate: {text} ..."))
    path = arguments.out or default_profile_path()
    save_profile(profile, path)
    seconds = time.perf_counter() - started
    if arguments.json:
        print_json({"profile": str(path), "seconds": seconds})
    else:
        print(f"{profile.title}: {profile.machine.cores} cores, written to {path} in {seconds:.0f} s")
    return 0
