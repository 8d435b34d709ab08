"""Plain-word overrides -> Workload, Cluster, SearchConfig: Hydra composes the groups of conf/, pydantic checks them.

model=any2any-digits cluster=local workload.global_batch_size=32 search.max_tp=8
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from megatron_mosaic.cost_model.hardware.catalogue import load_gpu_type, local_cluster
from megatron_mosaic.cost_model.hardware.profile import Profile, default_profile_path, load_profile
from megatron_mosaic.cost_model.model import CostModel
from megatron_mosaic.errors import ConfigError
from megatron_mosaic.plan.cluster import Cluster, Link
from megatron_mosaic.plan.training import DEFAULT_SETUP, Format, Sharding, TrainingSetup
from megatron_mosaic.plan.workload import Workload
from megatron_mosaic.plan.workload_file import Count, Items, ModelSection, make_workload
from megatron_mosaic.plan.yaml_text import MAX_AMOUNT, MAX_COUNT, Schema, describe_violation
from megatron_mosaic.search.space import SearchConfig

GROUPS = ("model", "cluster", "workload", "search")
_SHORT = reprlib.Repr(maxstring=100)
_KIND_OF_CLUSTER = re.compile(r"\bcluster\.(gpu|local)\.")  # pydantic names the branch of the union in a path

# What Hydra is asked to parse: its grammar takes time with the square of a word, and its other words (deletions,
# packages, keys of hydra itself, interpolations of the environment) are none of ours.
_MAX_WORD, _MAX_KEY, _MAX_WORDS = 2000, 200, 20_000  # characters of a word, of its key, of all words
_OVERRIDE = re.compile(r"\+{0,2}([A-Za-z_]\w*(?:\.\w[\w-]*)*)=(.*)", re.ASCII | re.DOTALL)


class LinkSection(Schema):
    name: str
    bytes_per_s: float = Field(ge=1, le=MAX_AMOUNT)
    latency_s: float = Field(gt=0, le=10)  # beyond either is a slip
    source: str


class GpuClusterSection(Schema):
    kind: Literal["gpu"]
    name: str
    gpu: str
    num_nodes: Count
    gpus_per_node: Count
    intra: LinkSection
    inter: LinkSection


class LocalClusterSection(Schema):
    kind: Literal["local"]
    num_ranks: Count


Share = Annotated[float, Field(ge=0, le=1)]


class TrainingSection(Schema):
    format: Format = Format.bf16
    sharding: Sharding = Sharding.none
    gradient_overlap_frac: Share = 0.0
    tp_overlap_frac: Share = 0.0
    expert_overlap_frac: Share = 0.0


class WorkloadSection(Schema):
    global_batch_size: Count
    items_per_sample: dict[str, Items] = {}
    training: TrainingSection = TrainingSection()


class SearchSection(Schema):
    max_tp: Count
    max_pp: Count
    max_micro_batch_size: Count
    memory_frac: float
    min_gain_frac: float


class Sections(Schema):
    """What the composed configuration must look like."""

    model: ModelSection
    cluster: Annotated[GpuClusterSection | LocalClusterSection, Field(discriminator="kind")]
    workload: WorkloadSection
    search: SearchSection


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What to plan: a workload on a cluster, within the limits of a search."""

    workload: Workload
    cluster: Cluster
    search: SearchConfig
    profile: Profile | None
    setup: TrainingSetup = DEFAULT_SETUP

    def cost_model(self) -> CostModel:
        return CostModel(self.workload, self.cluster, self.profile, self.setup)


def group_options(group: str) -> tuple[str, ...]:
    """Names that `group=NAME` accepts."""
    folder = files("megatron_mosaic.conf") / group
    return tuple(sorted(e.name.removesuffix(".yaml") for e in folder.iterdir() if e.name.endswith(".yaml")))


def load_task(overrides: Sequence[str], *, profile_path: str | Path | None = None) -> Task:
    """The task that the overrides describe. ConfigError for wrong words, ProfileError without a needed profile."""
    sections = compose_sections(overrides)
    workload = build_workload(sections)
    profile: Profile | None = None
    setup = TrainingSetup(**sections.workload.training.model_dump())
    if isinstance(sections.cluster, LocalClusterSection):
        if setup != DEFAULT_SETUP:
            raise ConfigError(
                "workload.training",
                got="another set-up for cluster=local",
                expected="the set-up that `mosaic calibrate` measured",
                fix="leave it out, or plan for GPUs",
            )
        profile = load_profile(profile_path or default_profile_path())
        cluster = local_cluster(profile, sections.cluster.num_ranks)
    else:
        cluster = _gpu_cluster(sections.cluster)
    return Task(
        workload=workload,
        cluster=cluster,
        search=SearchConfig(**sections.search.model_dump()),
        profile=profile,
        setup=setup,
    )


def load_workload(overrides: Sequence[str]) -> Workload:
    """The workload alone: no cluster, no profile needed."""
    return build_workload(compose_sections(overrides))


def compose_sections(overrides: Sequence[str]) -> Sections:
    """The composed and checked configuration."""
    _validate_words(overrides)
    data = _compose(overrides)
    try:
        return Sections.model_validate(data)
    except ValidationError as error:
        parts = describe_violation(error, known="a key of this group")
        raise ConfigError(**{key: _KIND_OF_CLUSTER.sub("cluster.", text) for key, text in parts.items()}) from error


def build_workload(sections: Sections) -> Workload:
    """Modules with the batch and the item counts of the workload section."""
    model, items = sections.model, sections.workload.items_per_sample
    unknown = sorted(set(items) - set(model.modules))
    if unknown:
        raise ConfigError(
            f"workload.items_per_sample.{unknown[0]}",
            got=unknown[0],
            expected=f"one of {list(model.modules)}",
            fix="name a module of the model",
        )
    return make_workload(model, global_batch_size=sections.workload.global_batch_size, items_per_sample=items)


def _gpu_cluster(section: GpuClusterSection) -> Cluster:
    if section.num_nodes * section.gpus_per_node > MAX_COUNT:
        raise ConfigError(
            "cluster.num_nodes",
            got=f"{section.num_nodes} nodes of {section.gpus_per_node} GPUs",
            expected=f"at most {MAX_COUNT} GPUs",
            fix="lower one of them",
        )
    return Cluster(
        name=section.name,
        gpu=load_gpu_type(section.gpu),
        num_nodes=section.num_nodes,
        gpus_per_node=section.gpus_per_node,
        intra=Link(**section.intra.model_dump()),
        inter=Link(**section.inter.model_dump()),
    )


def _validate_words(overrides: Sequence[str]) -> None:
    """ConfigError unless every word is `key=value` with a key of a group and a value that stands for itself."""
    if (length := sum(map(len, overrides))) > _MAX_WORDS:
        raise ConfigError(
            "overrides",
            got=f"{len(overrides)} words of {length} characters",
            expected=f"at most {_MAX_WORDS} characters",
            fix="leave out what is at its default",
        )
    for override in overrides:
        _validate_word(override, where=f"override {_SHORT.repr(override)}")


def _validate_word(override: str, *, where: str) -> None:
    match = _OVERRIDE.fullmatch(override)
    key, value = match.groups() if match else ("", "")
    group = key.partition(".")[0]
    for wrong, got, expected, fix in (
        (len(override) > _MAX_WORD, f"{len(override)} characters", f"at most {_MAX_WORD}", "shorten it"),
        (override.startswith("~"), "a deletion", "key=value: nothing can be deleted", "give the key another value"),
        ("=" not in override, "no =", "key=value, e.g. search.max_tp=8", "write key=value"),
        ("$" in override, "an interpolation ($)", "a value that stands for itself", "write the value"),
        (not match or len(key) > _MAX_KEY, "a key with other characters", "group.key=value", "correct the key"),
        (group not in GROUPS, group, f"a key of {', '.join(GROUPS)}", "correct the key"),
        (key == group and override.startswith("+"), "a second file of a group", f"{group}=NAME", "leave out the +"),
    ):
        if wrong:
            raise ConfigError(where, got=got, expected=expected, fix=fix)
    if key == group and value not in (names := group_options(group)):
        is_file = "/" in value or value.endswith(".yaml")
        raise ConfigError(
            where,
            got=_SHORT.repr(value) if value else "nothing",
            expected=f"one of {list(names)}" + (": files of one's own are not read here" if is_file else ""),
            fix="choose one",
        )


def _compose(overrides: Sequence[str]) -> Mapping[str, Any]:
    # Hydra costs 0.2 s to import: only who composes pays.
    from hydra import compose, initialize_config_module
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        with initialize_config_module("megatron_mosaic.conf", version_base="1.3"):
            data = OmegaConf.to_container(compose("config", overrides=list(overrides)), resolve=True)
    except (HydraException, OmegaConfBaseException, RecursionError) as error:
        message = " ".join(str(error).split("\n")[0].split())
        where = next((f"override {_SHORT.repr(o)}" for o in overrides if o in str(error)), "overrides")
        if where == "overrides" and (key := re.search(r"override '([^']*)'", str(error))):
            where = next((f"override {_SHORT.repr(o)}" for o in overrides if o.lstrip("+").startswith(key[1])), where)
        raise ConfigError(
            where,
            got=message,
            expected=f"keys of the groups {', '.join(GROUPS)}, e.g. search.max_tp=8",
            fix="correct the key or the value",
        ) from error
    assert isinstance(data, dict)
    return {str(key): value for key, value in data.items()}
