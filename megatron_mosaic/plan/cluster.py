"""What it runs on: GPUs, links, nodes. Plain numbers, each with its source. And how that is written in YAML."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Literal, Self

from pydantic import Discriminator, Field, Tag, model_validator

from megatron_mosaic.errors import ConfigError
from megatron_mosaic.plan.yaml_text import FORM_NAME, FORM_SECTION, MAX_AMOUNT, MAX_COUNT, Schema


def _require_positive(where: str, values: Mapping[str, float]) -> None:
    for key, value in values.items():
        if not value > 0:
            raise ConfigError(f"{where}: {key}", got=value, expected="above 0", fix=f"set {key}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """A way between two ranks: `latency_s` + bytes / `bytes_per_s`."""

    name: str
    bytes_per_s: float
    latency_s: float
    source: str

    def __post_init__(self) -> None:
        _require_positive(f"link {self.name!r}", {"bytes_per_s": self.bytes_per_s, "latency_s": self.latency_s})
        if not self.source.strip():
            raise ConfigError(
                f"link {self.name!r}: source", got="''", expected="where the numbers come from", fix="say"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuType:
    """One kind of device. `num_sms` is what quotas are granted in, `sm_granularity` at a time.

    On a CPU an SM is a core (a thread of the intra-op pool) and `peak_flops` etc. come from calibration.
    `sources` has one entry per number.
    """

    name: str
    num_sms: int
    sm_granularity: int
    memory_bytes: float
    flops_per_s: float  # dense, in the training precision
    memory_bytes_per_s: float
    gemm_efficiency_frac: float  # share of flops_per_s that large matrix products reach
    sources: Mapping[str, str] = field(hash=False)
    # Fitted to published steps; the defaults are ideal hardware, for which closed forms hold exactly
    attention_efficiency_frac: float = 1.0  # of flops_per_s that a fused attention kernel reaches
    bandwidth_frac: float = 1.0  # of memory_bytes_per_s that elementwise kernels reach
    intra_frac: float = 1.0  # of the bandwidth between GPUs of a node that collectives reach
    network_frac: float = 1.0  # and of that between nodes
    half_depth: float = 1.0  # inner dimension at which a matrix product reaches half its efficiency
    launch_s: float = 1e-9  # host time to launch a kernel: a lower bound of its duration
    low_precision_frac: float = 1.0  # efficiency of 8- and 4-bit matrix products, relative to 16 bit
    interference_residual: float = 0.0  # what lanes beside each other cost beyond bandwidth; no source: not measured
    fp8_flops_per_s: float = 0.0  # dense; 0: not supported
    fp4_flops_per_s: float = 0.0

    def __post_init__(self) -> None:
        fitted = ("attention_efficiency_frac", "bandwidth_frac", "intra_frac", "network_frac", "half_depth", "launch_s")
        _require_positive(f"GPU type {self.name!r}", {key: getattr(self, key) for key in fitted})
        numbers = {
            key: getattr(self, key)
            for key in (
                "num_sms",
                "sm_granularity",
                "memory_bytes",
                "flops_per_s",
                "memory_bytes_per_s",
                "gemm_efficiency_frac",
            )
        }
        _require_positive(f"GPU type {self.name!r}", numbers)
        for key in numbers:
            if not self.sources.get(key, "").strip():
                raise ConfigError(
                    f"GPU type {self.name!r}: sources.{key}",
                    got="nothing",
                    expected="where the number comes from",
                    fix=f"add sources: {{{key}: ...}}",
                )


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """Nodes of equal GPUs. Rank r sits on node r // gpus_per_node.

    `shared_cores` is set on a CPU machine only: the cores of a node, which all its ranks share, so that ranks
    slow each other down when more of them compute than there are cores. 0: every rank owns its device.
    """

    name: str
    gpu: GpuType
    num_nodes: int
    gpus_per_node: int
    intra: Link
    inter: Link
    shared_cores: int = 0

    def __post_init__(self) -> None:
        _require_positive(f"cluster {self.name!r}", {"num_nodes": self.num_nodes, "gpus_per_node": self.gpus_per_node})
        if self.shared_cores < 0:
            raise ConfigError(
                f"cluster {self.name!r}: shared_cores", got=self.shared_cores, expected="0 or more", fix="set it"
            )

    @property
    def num_ranks(self) -> int:
        return self.num_nodes * self.gpus_per_node

    def node_of(self, rank: int) -> int:
        return rank // self.gpus_per_node

    def link_between(self, ranks: tuple[int, ...]) -> Link:
        """The slowest link that a group of ranks has to cross."""
        return self.intra if self.node_of(min(ranks)) == self.node_of(max(ranks)) else self.inter


# -- how it is written: in conf/cluster/, in overrides, in a plan -------------------------------------------------

Count = Annotated[int, Field(strict=True, ge=1, le=MAX_COUNT)]


class LinkSection(Schema):
    name: str
    bytes_per_s: float = Field(ge=1, le=MAX_AMOUNT)
    latency_s: float = Field(gt=0, le=10)  # beyond either is a slip
    source: str


Share = Annotated[float, Field(strict=True, ge=1e-6, le=1)]  # of what the datasheet promises
Text = Annotated[str, Field(strict=True, pattern=r"\S")]


class GpuTypeFile(Schema):
    """Fitted constants of a GPU type (`GpuType` says what each means), in a file of their own or inside a plan.

    A constant that is left out is not in `constants`. `sources` has an entry for each that is set.
    """

    gpu_type: Annotated[int, Field(strict=True, ge=1, le=1)]
    base: Annotated[str, Field(strict=True)]
    gemm_efficiency_frac: Share = 0.0
    attention_efficiency_frac: Share = 0.0
    bandwidth_frac: Share = 0.0
    intra_frac: Share = 0.0
    network_frac: Share = 0.0
    half_depth: Annotated[float, Field(strict=True, gt=0, le=MAX_COUNT)] = 0.0
    launch_s: Annotated[float, Field(strict=True, gt=0, le=1)] = 0.0
    low_precision_frac: Annotated[float, Field(strict=True, ge=1e-6, le=1e6)] = 0.0  # of 16 bit, may be above 1
    interference_residual: Annotated[float, Field(strict=True, ge=0, le=100)] = 0.0
    sources: Mapping[str, Text] = {}

    @property
    def constants(self) -> dict[str, float]:
        """Name -> value of the constants that are set; seconds, shares, and a depth in elements."""
        return {name: getattr(self, name) for name in CONSTANTS if name in self.model_fields_set}


CONSTANTS = tuple(name for name in GpuTypeFile.model_fields if name not in ("gpu_type", "base", "sources"))


class MeasuredGpu(GpuTypeFile):
    """A GPU type file inside a plan, so that the plan needs no other file. `name`: what the file was called."""

    name: Text

    @model_validator(mode="after")
    def _validate_sources(self) -> Self:
        if self.constants.keys() != self.sources.keys():
            raise ValueError(f"sources of the constants that are set, and of no others: {list(self.constants)}")
        return self


def _form_of_gpu(value: object) -> str:
    return FORM_NAME if isinstance(value, str) else FORM_SECTION


class GpuClusterSection(Schema):
    kind: Literal["gpu"]
    name: str
    gpu: Annotated[
        Annotated[str, Tag(FORM_NAME)] | Annotated[MeasuredGpu, Tag(FORM_SECTION)], Discriminator(_form_of_gpu)
    ]
    num_nodes: Count
    gpus_per_node: Count
    intra: LinkSection
    inter: LinkSection

    @property
    def num_ranks(self) -> int:
        return self.num_nodes * self.gpus_per_node


class LocalClusterSection(Schema):
    """This machine. `profile`: the name of the one that a plan was made with."""

    kind: Literal["local"]
    num_ranks: Count
    profile: str = ""

    @property
    def name(self) -> str:
        return "local"


def _form_of_cluster(value: object) -> str:
    if isinstance(value, str):
        return FORM_NAME
    kind = value.get("kind") if isinstance(value, Mapping) else getattr(value, "kind", None)
    return "~local" if kind == "local" else "~gpu"


_Gpu = Annotated[GpuClusterSection, Tag("~gpu")]
_Local = Annotated[LocalClusterSection, Tag("~local")]
ClusterSection = Annotated[_Gpu | _Local, Discriminator(_form_of_cluster)]  # all values, as in conf/cluster
ClusterField = Annotated[Annotated[str, Tag(FORM_NAME)] | _Gpu | _Local, Discriminator(_form_of_cluster)]
