"""A plan together with the command line: the plan says cluster, training, model and batch, the command line wins."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from megatron_mosaic.cli.output import print_note
from megatron_mosaic.config import (
    ClusterValues,
    Sections,
    Task,
    build_task,
    build_workload,
    compose_sections,
    group_options,
    name_cluster,
    shipped_cluster,
)
from megatron_mosaic.errors import PlanError
from megatron_mosaic.plan import Plan
from megatron_mosaic.plan.cluster import ClusterSection, LocalClusterSection
from megatron_mosaic.plan.tasks.waves import WavePlan
from megatron_mosaic.plan.training import TrainingSection, TrainingSetup
from megatron_mosaic.plan.validate import list_empty_replicas
from megatron_mosaic.plan.workload import Workload

_KEY = re.compile(r"[+~]*([^=@]*)")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Planned[P: Plan | WavePlan]:
    """A plan as the command line leaves it, and the configuration it stands in.

    `notes`: what the command line changed. Where neither says a cluster, or how it is trained, the plan has none.
    """

    plan: P
    sections: Sections
    notes: tuple[str, ...]

    @property
    def setup(self) -> TrainingSetup | None:
        """How it is trained, as far as that is known: without a cluster, on GPUs unless it is in fp32."""
        return self.sections.setup if self.plan.cluster else self.plan.training

    @property
    def cluster(self) -> ClusterValues | None:
        return self.sections.cluster if self.plan.cluster else None

    @property
    def workload(self) -> Workload:
        return build_workload(self.sections)

    def build_task(self, profile_path: str | Path | None) -> Task:
        """What the cost model needs. PlanError where the plan has no cluster or training; ConfigError, ProfileError."""
        for key, words in (
            ("cluster", "cluster=NAME (cluster=local cluster.num_ranks=N for this machine)"),
            ("training", "workload.training.format=bf16, with sharding and overlaps if there are any"),
        ):
            if not getattr(self.plan, key):
                raise PlanError(
                    key,
                    got="nothing in the plan or on the command line",
                    expected="what the prediction is for",
                    fix=f"add {words}, or make the plan again with `mosaic plan`",
                )
        return build_task(self.sections, profile_path=profile_path)


class Planned(_Planned[Plan]):
    """A plan of modules."""


class PlannedWaves(_Planned[WavePlan]):
    """A plan in waves."""


def apply_overrides(plan: Plan, overrides: Sequence[str]) -> Planned:
    """The plan with the overrides of the command line. PlanError, ConfigError for what does not compose."""
    chosen, sections, notes = _apply(plan, overrides)
    return Planned(
        plan=chosen, sections=sections, notes=(*notes, *list_empty_replicas(chosen, build_workload(sections)))
    )


def apply_to_waves(plan: WavePlan, overrides: Sequence[str]) -> PlannedWaves:
    """The same for a plan in waves."""
    chosen, sections, notes = _apply(plan, overrides)
    return PlannedWaves(plan=chosen, sections=sections, notes=notes)


def _apply[P: Plan | WavePlan](plan: P, overrides: Sequence[str]) -> tuple[P, Sections, tuple[str, ...]]:
    keys = [_key_of(word) for word in overrides]
    if "model" not in keys:
        _require_option("workload", plan.workload, "model")
    words = [] if "model" in keys else [f"model={plan.workload}"]
    words.append(f"workload.global_batch_size={plan.global_batch_size}")
    said = plan.training
    words += [f"workload.training.{key}={getattr(said, key)}" for key in TrainingSection.model_fields if said]
    cluster = "" if "cluster" in keys else plan.cluster
    if isinstance(cluster, str) and cluster:
        _require_option("cluster", cluster, "cluster")
        words.append(f"cluster={cluster}")
    sections = compose_sections([*words, *overrides], cluster if isinstance(cluster, Mapping) else None)
    known = bool(plan.cluster) or "cluster" in keys  # else the sections have the default of conf
    on_cpus = known and isinstance(sections.cluster, LocalClusterSection)
    is_told = said is not None or on_cpus or any(key.startswith("workload.training") for key in keys)
    chosen = replace(
        plan,
        global_batch_size=sections.workload.global_batch_size,
        cluster=name_cluster(sections.cluster) if known else "",
        training=sections.training if is_told else None,
    )
    return chosen, sections, tuple(_changes(plan, chosen, overrides))


def print_notes(planned: Planned | PlannedWaves, profile_title: str = "") -> None:
    """On stderr, a line each: what the command line changed, and another profile than the plan was made with."""
    for note in planned.notes:
        print_note(note)
    section = planned.sections.cluster
    if isinstance(section, LocalClusterSection) and section.profile not in ("", profile_title):
        print_note(f"the plan was made with the {section.profile}, and this is predicted with the {profile_title}")


def _require_option(where: str, name: str, group: str) -> None:
    if name not in group_options(group):
        raise PlanError(
            where,
            got=name,
            expected=f"one of {list(group_options(group))}",
            fix=f"add {group}=NAME to the command line, or conf/{group}/{name}.yaml",
        )


def _changes(before: Plan | WavePlan, after: Plan | WavePlan, overrides: Sequence[str]) -> Iterator[str]:
    """A sentence for each override that says something else than the plan."""
    old, new = _values_of(before), _values_of(after)
    for word in overrides:
        said, meant = (_look_up(values, _key_of(word)) for values in (old, new))
        if said is not None and said != meant:
            yield f"{word}: the plan says {_shorten(said)}"


def _values_of(plan: Plan | WavePlan) -> dict[str, Any]:
    """What a plan says, by the keys of overrides."""
    said = plan.training
    training = {key: getattr(said, key) for key in TrainingSection.model_fields} if said else None
    workload = {"global_batch_size": plan.global_batch_size, "training": training}
    return {"workload": workload, "cluster": _cluster_values(plan.cluster)}


def _cluster_values(cluster: str | Mapping[str, Any]) -> Mapping[str, Any] | None:
    if not cluster:
        return None
    if isinstance(cluster, str):
        return shipped_cluster(cluster).model_dump() if cluster in group_options("cluster") else {"name": cluster}
    found: ClusterValues = TypeAdapter(ClusterSection).validate_python(cluster)
    return found.model_dump(exclude={"profile"})  # where it was measured, not what is asked for


def _look_up(values: Any, key: str) -> Any:
    """The value at a dotted key; None where there is none."""
    for part in key.split("."):
        values = values.get(part) if isinstance(values, Mapping) else None
    return values


def _shorten(said: Any) -> str:
    if not isinstance(said, Mapping):
        return str(said)
    return said.get("name") or ", ".join(f"{key} {value}" for key, value in said.items())


def _key_of(word: str) -> str:
    """`+workload.training.format=fp8` -> `workload.training.format`."""
    match = _KEY.match(word)
    return match[1] if match else ""
