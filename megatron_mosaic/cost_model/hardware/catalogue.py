"""GPU types from `gpu_types/*.yaml` or a file of local measurements, and the cluster that a profile describes."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from megatron_mosaic.cost_model.hardware.fit import FittedProfile
from megatron_mosaic.cost_model.hardware.gpu_type_file import SUFFIX, load_gpu_type_file
from megatron_mosaic.cost_model.hardware.profile import CALIBRATE, Operation, Profile
from megatron_mosaic.errors import ConfigError, ProfileError
from megatron_mosaic.plan.cluster import Cluster, GpuType, Link, MeasuredGpu


def gpu_type_names() -> tuple[str, ...]:
    """Names of the GPU types that have a file."""
    folder = files(__package__) / "gpu_types"
    return tuple(sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml")))


def load_gpu_type(gpu: str | MeasuredGpu) -> GpuType:
    """The GPU type of `gpu_types/<gpu>.yaml`; of a path that ends in .yaml, the file's base with its constants.

    ConfigError lists the known names, or names the file's line.
    """
    found = embed_gpu_type(gpu)
    if isinstance(found, str):
        return _load_named(found)
    base = _load_named(found.base)
    values: dict[str, Any] = dict(found.constants)
    return replace(base, name=found.name, sources={**base.sources, **found.sources}, **values)


def embed_gpu_type(gpu: str | MeasuredGpu) -> str | MeasuredGpu:
    """What a plan says of a GPU: a name as it is, of a path that ends in .yaml what stands in the file."""
    if isinstance(gpu, MeasuredGpu) or not gpu.endswith(SUFFIX):
        return gpu
    file = load_gpu_type_file(gpu, gpu_type_names())
    return MeasuredGpu(name=Path(gpu).name, **file.model_dump(exclude_unset=True))


@cache
def _load_named(name: str) -> GpuType:
    if name not in gpu_type_names():
        raise ConfigError(
            "cluster.gpu",
            got=name,
            expected=f"one of {list(gpu_type_names())}",
            fix="choose one, or give a file of measurements: FILE.yaml",
        )
    data = yaml.safe_load((files(__package__) / "gpu_types" / f"{name}.yaml").read_text(encoding="utf-8"))
    try:
        return GpuType(name=name, **data)
    except TypeError as error:
        raise ConfigError(
            f"gpu_types/{name}.yaml", got=str(error), expected="the fields of GpuType", fix="correct the file"
        ) from error


def local_cluster(profile: Profile, num_ranks: int) -> Cluster:
    """This machine: `num_ranks` processes that share its cores and its memory evenly.

    An SM is a core, granted one at a time. Links are the measured rank-to-rank line.
    """
    source = profile.title
    machine = profile.machine
    line = FittedProfile(profile).collective(Operation.p2p, 2)
    if not line.intercept_s > 0:
        raise ProfileError(line.where, got=f"{line.intercept_s} s for no bytes", expected="above 0", fix=CALIBRATE)
    per_byte_s = max(line.slope_s, 1 / machine.memory_bytes_per_s)  # a message is copied at least
    link = Link(name="processes", bytes_per_s=1 / per_byte_s, latency_s=line.intercept_s, source=source)
    keys = ("num_sms", "sm_granularity", "memory_bytes", "flops_per_s", "memory_bytes_per_s", "gemm_efficiency_frac")
    gpu = GpuType(
        name="cpu",
        num_sms=max(1, machine.cores // num_ranks),  # the part of the machine that one rank may call its own
        sm_granularity=1,
        memory_bytes=machine.memory_bytes / num_ranks,
        flops_per_s=machine.flops_per_s,
        memory_bytes_per_s=machine.memory_bytes_per_s,
        gemm_efficiency_frac=1.0,  # flops_per_s is measured on matrix products already
        sources=dict.fromkeys(keys, source),
    )
    return Cluster(
        name="local",
        gpu=gpu,
        num_nodes=1,
        gpus_per_node=num_ranks,
        intra=link,
        inter=link,
        shared_cores=machine.cores,
    )
