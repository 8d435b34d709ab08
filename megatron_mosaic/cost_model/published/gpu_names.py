"""The cluster of a row. A GPU is named by its words: its memory, its power and its form are part of the name."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from megatron_mosaic.cost_model.hardware.catalogue import load_gpu_type
from megatron_mosaic.cost_model.published.cells import Refusal, Row, words_of
from megatron_mosaic.plan.cluster import Cluster, GpuType, Link


@dataclass(frozen=True, slots=True, kw_only=True)
class _System:
    """GPUs of a name: by the memory that is stated (GB), its type; ranks that NVLink joins; bytes/s of a rank."""

    types: Mapping[int, str]
    per_node: int
    intra: float
    inter: float
    power_w: int = 0  # of the usual part; 0: nobody states another

    @property
    def usual(self) -> str:
        return next(iter(self.types.values()))


# datasheets; of the 72 ranks in a rack the tables use 64. What is marketed as 80 GB is listed as 79 or 80, and so on
_SYSTEMS = {
    "gb300": _System(types={288: "gb300", 279: "gb300", 278: "gb300"}, per_node=64, intra=900e9, inter=100e9),
    "gb200": _System(types={186: "gb200", 189: "gb200", 192: "gb200"}, per_node=64, intra=900e9, inter=50e9),
    "b300": _System(types={288: "b300_sxm", 279: "b300_sxm", 270: "b300_sxm"}, per_node=8, intra=900e9, inter=100e9),
    "b200": _System(types={180: "b200_sxm", 192: "b200_sxm"}, per_node=8, intra=900e9, inter=50e9),
    "h200": _System(types={141: "h200_sxm"}, per_node=8, intra=450e9, inter=50e9),
    "h800": _System(types={80: "h100_sxm"}, per_node=8, intra=200e9, inter=50e9),
    "h100": _System(
        types={80: "h100_sxm", 96: "h100_sxm_96gb", 95: "h100_sxm_96gb"}, per_node=8, intra=450e9, inter=50e9,
        power_w=700,
    ),
    "a800": _System(types={80: "a100_sxm_80gb"}, per_node=8, intra=200e9, inter=25e9),
    "a100": _System(types={80: "a100_sxm_80gb", 40: "a100_sxm_40gb"}, per_node=8, intra=300e9, inter=25e9, power_w=400),
}  # fmt: skip
_OTHER_FORMS = {"pcie": "PCIe cards have another power and no NVLink switch", "nvl": "NVL cards come in pairs"}
_SOURCE = "bandwidth: datasheet of the system, or what the row states; latency: NCCL tuning.cc, ring, simple"


def build_cluster(row: Row, n_gpus: int, gpus: Mapping[str, GpuType]) -> Cluster:
    """Nodes of the row's GPU; `gpus` replaces types by name. Refusal where the name is of no type, or of several."""
    system, gpu_name = _find_system(row.get("gpu", ""))
    per_node, inter, notes = system.per_node, system.inter, row.get("notes", "")
    if stated := re.search(r"inter (\d+)Gbps/node", notes):
        inter = float(stated[1]) / 8 * 1e9 / per_node
    if stated := re.search(r"(\d+)x(\d+)Gb RoCE per node", notes):
        inter = float(stated[1]) * float(stated[2]) / 8 * 1e9 / per_node
    return Cluster(
        name=gpu_name,
        gpu=gpus.get(gpu_name) or load_gpu_type(gpu_name),
        num_nodes=-(-n_gpus // per_node),
        gpus_per_node=min(n_gpus, per_node),
        intra=Link(name="nvlink", bytes_per_s=system.intra, latency_s=3.4e-6, source=_SOURCE),
        inter=Link(name="network", bytes_per_s=inter, latency_s=14e-6, source=_SOURCE),
    )


def _find_system(name: str) -> tuple[_System, str]:
    words = words_of(name)
    named = [_SYSTEMS[word] for word in _SYSTEMS if word in words]
    if not named:
        if "hopper" in words:
            raise Refusal(f"GPU {name!r}: which of H100, H200 and H800 is not stated")
        raise Refusal(f"GPU {name!r} has no file in gpu_types")
    for word, reason in _OTHER_FORMS.items():
        if word in words:
            raise Refusal(f"GPU {name!r} has no file in gpu_types: {reason}")
    system = min(named, key=lambda each: each.intra)  # of A100/A800, which share all but NVLink: what both have
    sizes = [int(size) for size in re.findall(r"(?<![\d.])(\d{2,3}) ?gi?b", name.lower())]
    unknown = [size for size in sizes if size not in system.types]
    if unknown or len({system.types[size] for size in sizes}) > 1:
        raise Refusal(f"GPU {name!r} has no file in gpu_types: none of its kind has this memory")
    found = system.types[sizes[0]] if sizes else system.usual
    watts = [int(power) for power in re.findall(r"(?<![\d.])(\d{3,4}) ?w\b", name.lower())]
    if watts and found == system.usual and system.power_w and watts[0] != system.power_w:
        raise Refusal(f"GPU {name!r} has no file in gpu_types: {watts[0]} W, the file is of {system.power_w} W")
    return system, found
