"""`mosaic calibrate`: this machine as a profile, or its GPU as a file of constants."""

from __future__ import annotations

import argparse
import os
import time

from megatron_mosaic.cli.calibrate_run import correct_by_run
from megatron_mosaic.cli.imports import import_runtime
from megatron_mosaic.cli.output import print_json, print_note, print_progress, print_table, write_text
from megatron_mosaic.config import compose_sections
from megatron_mosaic.cost_model.hardware.catalogue import gpu_type_names, load_gpu_type
from megatron_mosaic.cost_model.hardware.gpu_type_file import SUFFIX, format_gpu_type_file
from megatron_mosaic.cost_model.hardware.profile import default_profile_path, save_profile
from megatron_mosaic.errors import ConfigError
from megatron_mosaic.plan.cluster import LocalClusterSection


def main(arguments: argparse.Namespace) -> int:
    """Measure, write the profile (with `--gpu-type` the constants of the GPU), say where it is."""
    if arguments.from_run is not None:
        return correct_by_run(arguments)
    if arguments.gpu_type is not None:
        return _calibrate_gpu(arguments)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    started = time.perf_counter()
    cluster = compose_sections(arguments.overrides).cluster
    if not isinstance(cluster, LocalClusterSection):
        raise ConfigError("cluster", got=cluster.name, expected="local: this machine is measured", fix="leave it out")
    num_ranks = max(2, cluster.num_ranks)
    import_runtime()
    from megatron_mosaic.calibrate.host import calibrate

    profile = calibrate(num_ranks=num_ranks, progress=lambda text: print_progress(f"calibrate: {text} ..."))
    path = arguments.out or default_profile_path()
    save_profile(profile, path)
    seconds = time.perf_counter() - started
    if profile.interference is None:
        print_note("no interference of modules beside each other: it needs two cores, and nobody else on them")
    if arguments.json:
        print_json({"profile": str(path), "seconds": seconds})
    else:
        print(f"{profile.title}: {profile.machine.cores} cores, written to {path} in {seconds:.0f} s")
    return 0


def _calibrate_gpu(arguments: argparse.Namespace) -> int:
    """Measure the GPU that torch uses, write its constants for `cluster.gpu=FILE.yaml`."""
    started = time.perf_counter()
    name, out = arguments.gpu_type, arguments.out
    if name not in gpu_type_names():
        raise ConfigError("--gpu-type", got=name, expected=f"one of {list(gpu_type_names())}", fix="name one of them")
    if not (out or "").endswith(SUFFIX):
        raise ConfigError(
            "--out", got=out or "nothing", expected="FILE.yaml, for cluster.gpu", fix="give --out FILE.yaml"
        )
    if arguments.overrides:
        raise ConfigError(
            f"override {arguments.overrides[0]!r}",
            got="an override with --gpu-type",
            expected="none",
            fix="leave it out",
        )
    from megatron_mosaic.calibrate.gpu import current_device, describe_source, measure_constants

    device, base = current_device(), load_gpu_type(name)
    found = measure_constants(base, device, progress=lambda text: print_progress(f"calibrate: {text} ..."))
    source = describe_source(device)
    write_text(out, format_gpu_type_file(name, found, source))
    seconds = time.perf_counter() - started
    if arguments.json:
        print_json({"gpu_type": out, "constants": found, "seconds": seconds})
        return 0
    rows = [(key, f"{getattr(base, key):.5g}", f"{value:.5g}") for key, value in found.items()]
    print_table(source, ("constant", name, "measured"), rows)
    print(f"written to {out} in {seconds:.0f} s: mosaic plan ... cluster.gpu={out}")
    print_note(
        "these describe kernels alone; fitted ones hold what a step loses beside them too: expect shorter predictions"
    )
    return 0
