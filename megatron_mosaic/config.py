"""Plain-word overrides -> Workload, Cluster, SearchConfig: Hydra composes the groups of conf/, pydantic checks them.

model=any2any-digits cluster=local workload.global_batch_size=32 search.max_tp=8
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError

from megatron_mosaic.cost_model.hardware.catalogue import load_gpu_type, local_cluster
from megatron_mosaic.cost_model.hardware.profile import Profile, default_profile_path, load_profile
from megatron_mosaic.cost_model.model import CostModel
from megatron_mosaic.errors import ConfigError
from megatron_mosaic.plan.cluster import Cluster, GpuClusterSection, Link, LocalClusterSection
from megatron_mosaic.plan.training import DEFAULT_SETUP, TrainingSection, TrainingSetup
from megatron_mosaic.plan.workload import Workload
from megatron_mosaic.plan.workload_file import Count, ModelSection, make_workload
from megatron_mosaic.plan.yaml_text import MAX_COUNT, StrictModel, describe_violation
from megatron_mosaic.search.space import SearchConfig

GROUPS = ("model", "cluster", "workload", "search")
_KIND_OF_CLUSTER = re.compile(r"\bcluster\.(gpu|local)\.")  # pydantic names the branch of the union in a path
_GROUP_OVERRIDE = re.compile(r"\+*(" + "|".join(GROUPS) + r")=(.*)")


class WorkloadSection(StrictModel):
    global_batch_size: Count
    items_per_sample: dict[str, float] = {}
    training: TrainingSection = TrainingSection()


class SearchSection(StrictModel):
    max_tp: Count
    max_pp: Count
    max_micro_batch_size: Count
    memory_frac: float
    min_gain_frac: float


class Sections(StrictModel):
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
    for override in overrides:
        _validate_override(override)
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


def _validate_override(override: str) -> None:
    if "=" not in override:
        raise ConfigError(
            f"override {override!r}", got="no =", expected="key=value, e.g. search.max_tp=8", fix="write key=value"
        )
    match = _GROUP_OVERRIDE.fullmatch(override)
    if match and match[2] not in group_options(match[1]):
        raise ConfigError(
            f"override {override!r}",
            got=match[2] or "nothing",
            expected=f"one of {list(group_options(match[1]))}",
            fix=f"choose one, or add conf/{match[1]}/{match[2] or 'NAME'}.yaml",
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
        where = next((f"override {o!r}" for o in overrides if o in str(error)), "overrides")
        if where == "overrides" and (key := re.search(r"override '([^']*)'", str(error))):
            where = next((f"override {o!r}" for o in overrides if o.lstrip("+~").startswith(key[1])), where)
        raise ConfigError(
            where,
            got=message,
            expected=f"keys of the groups {', '.join(GROUPS)}, e.g. search.max_tp=8",
            fix="correct the key or the value",
        ) from error
    assert isinstance(data, dict)
    return {str(key): value for key, value in data.items()}
