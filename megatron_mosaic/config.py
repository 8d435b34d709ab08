"""Plain-word overrides -> Workload, Cluster, SearchConfig: Hydra composes the groups of conf/, pydantic checks them.

model=any2any-digits cluster=local workload.global_batch_size=32 search.max_tp=8
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from megatron_mosaic.cost_model.hardware.catalogue import embed_gpu_type, load_gpu_type, local_cluster
from megatron_mosaic.cost_model.hardware.profile import Profile, default_profile_path, load_profile
from megatron_mosaic.cost_model.model import CostModel, memory_limit_bytes
from megatron_mosaic.cost_model.source import MEASURED
from megatron_mosaic.errors import ConfigError
from megatron_mosaic.frozen import FrozenMap
from megatron_mosaic.launch.slurm.launcher_file import LauncherSection
from megatron_mosaic.plan import Plan
from megatron_mosaic.plan.cluster import Cluster, ClusterSection, GpuClusterSection, Link, LocalClusterSection
from megatron_mosaic.plan.training import DEFAULT_SETUP, Format, TrainingOverrides, TrainingSection, TrainingSetup
from megatron_mosaic.plan.workload import Workload
from megatron_mosaic.plan.workload_file import MODEL_FILE, Count, Items, ModelSection, make_workload
from megatron_mosaic.plan.yaml_text import MAX_COUNT, Schema, describe_violation, parse_section
from megatron_mosaic.search.pins import Exclusions, Pins, require_known
from megatron_mosaic.search.space import SearchConfig
from megatron_mosaic.text_file import FileKind, read_text_file, show_path

GROUPS = ("model", "cluster", "workload", "search", "train", "launcher")
ClusterValues = GpuClusterSection | LocalClusterSection
_OF_PLAN = "~plan"  # the option of the group `cluster` whose values are a plan's
_OF_FILE = "~file"  # of `model` and `cluster`: those of the user's own file
OWN_FILES = ("model", "cluster")  # groups that take one
CLUSTER_FILE = FileKind(what="a cluster file like those in conf/cluster", error=ConfigError, fix="check the path")
_SHORT = reprlib.Repr(maxstring=100)

# Mappings of names that no file of conf holds: Hydra takes a new key with ++ only
_OPEN = ("workload.items_per_sample.", "search.pin.", "search.exclude.")

# What Hydra is asked to parse: its grammar takes time with the square of a word, and its other words (deletions,
# packages, keys of hydra itself, interpolations of the environment) are none of ours.
_MAX_WORD, _MAX_KEY, _MAX_WORDS = 2000, 200, 20_000  # characters of a word, of its key, of all words
_OVERRIDE = re.compile(r"\+{0,2}([A-Za-z_]\w*(?:\.\w[\w-]*)*)=(.*)", re.ASCII | re.DOTALL)


class WorkloadSection(Schema):
    global_batch_size: Count
    items_per_sample: dict[str, Items] = {}
    training: TrainingOverrides = TrainingOverrides()


class SearchSection(Schema):
    max_tp: Count
    max_cp: Count
    max_pp: Count
    max_vpp: Count
    max_ep: Count
    max_micro_batch_size: Count
    memory_frac: float
    min_gain_frac: float
    time_budget_s: float
    algorithm: str
    pin: Pins
    exclude: Exclusions


class Sections(Schema):
    """What the composed configuration must look like."""

    model: ModelSection
    cluster: ClusterSection
    workload: WorkloadSection
    search: SearchSection
    train: dict[str, Any]
    launcher: LauncherSection

    @property
    def training(self) -> TrainingSetup:
        """How it is trained, as a plan says it. CPUs train in fp32 unless told otherwise."""
        given = self.workload.training
        usual = Format.fp32 if isinstance(self.cluster, LocalClusterSection) else Format.bf16
        return TrainingSetup(**given.model_dump() | {"format": given.format or usual})

    @property
    def setup(self) -> TrainingSetup:
        """The same for the cost model, which counts on fused attention where there are kernels for it."""
        return replace(self.training, fused_attention=not isinstance(self.cluster, LocalClusterSection))


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What to plan: a workload on a cluster, within the limits of a search. `said`: cluster and training as a plan
    says them."""

    workload: Workload
    cluster: Cluster
    search: SearchConfig
    profile: Profile | None
    said: tuple[str | FrozenMap[str, Any], TrainingSetup]
    setup: TrainingSetup = DEFAULT_SETUP

    def cost_model(self) -> CostModel:
        return CostModel(self.workload, self.cluster, self.profile, self.setup)

    def fits(self, peak_bytes: float) -> bool:
        """Whether a rank that holds this much leaves room for what `search.memory_frac` is for."""
        return peak_bytes <= memory_limit_bytes(self.cluster, self.search.memory_frac)

    def complete(self, plan: Plan) -> Plan:
        """The plan with what its numbers depend on beside itself: the cluster, and how it is trained."""
        cluster, training = self.said
        return replace(plan, cluster=cluster, training=training)


def group_options(group: str) -> tuple[str, ...]:
    """Names that `group=NAME` accepts."""
    folder = files("megatron_mosaic.conf") / group
    return tuple(sorted(e.name.removesuffix(".yaml") for e in folder.iterdir() if e.name.endswith(".yaml")))


def load_task(overrides: Sequence[str], *, profile_path: str | Path | None = None) -> Task:
    """The task that the overrides describe. ConfigError for wrong words, ProfileError without a needed profile."""
    return build_task(compose_sections(overrides), profile_path=profile_path)


def build_task(sections: Sections, *, profile_path: str | Path | None = None) -> Task:
    """The task of a composed configuration; reads the profile of cluster=local and the files of GPU types."""
    workload, section = build_workload(sections), sections.cluster
    require_known(sections.search.pin, sections.search.exclude, workload)
    profile: Profile | None = None
    if isinstance(section, LocalClusterSection):
        _require_measured(sections.setup)
        profile = load_profile(profile_path or default_profile_path())
        cluster = local_cluster(profile, section.num_ranks)
        section = section.model_copy(update={"profile": profile.title})
    else:
        cluster = _gpu_cluster(section)
    return Task(
        workload=workload,
        cluster=cluster,
        search=SearchConfig(**dict(sections.search)),
        profile=profile,
        said=(name_cluster(section), sections.training),
        setup=sections.setup,
    )


def name_cluster(section: ClusterValues) -> str | FrozenMap[str, Any]:
    """As a plan says it: the name of the shipped file if it is that file's cluster, else all values."""
    if isinstance(section, GpuClusterSection):
        if section.name in group_options("cluster") and section == shipped_cluster(section.name):
            return section.name
        section = section.model_copy(update={"gpu": embed_gpu_type(section.gpu)})
    return FrozenMap(section.model_dump(exclude_defaults=True))


def shipped_cluster(name: str) -> ClusterValues:
    """The values of a file of conf/cluster."""
    text = (files("megatron_mosaic.conf") / "cluster" / f"{name}.yaml").read_text(encoding="utf-8")
    found: ClusterValues = TypeAdapter(ClusterSection).validate_python(yaml.safe_load(text))
    return found


def _require_measured(setup: TrainingSetup) -> None:
    """ConfigError unless it is what a profile of this machine holds."""
    if setup != MEASURED:
        keys = [key for key in TrainingSection.model_fields if getattr(setup, key) != getattr(MEASURED, key)]
        raise ConfigError(
            f"workload.training.{keys[0]}",
            got=f"{getattr(setup, keys[0])} with cluster=local",
            expected=f"{getattr(MEASURED, keys[0])}: what `mosaic calibrate` measured",
            fix=f"set workload.training.{keys[0]}={getattr(MEASURED, keys[0])}, or plan for GPUs",
        )


def load_workload(overrides: Sequence[str]) -> Workload:
    """The workload alone: no cluster, no profile needed."""
    return build_workload(compose_sections(overrides))


def compose_sections(overrides: Sequence[str], cluster: Mapping[str, Any] | None = None) -> Sections:
    """The composed and checked configuration. `cluster`: values that the overrides start from, of no file of conf."""
    _validate_words(overrides)
    return validate_sections(_compose(overrides, cluster))


def validate_sections(data: Any) -> Sections:
    """What Hydra composed, checked. ConfigError names the key."""
    try:
        return Sections.model_validate(data)
    except ValidationError as error:
        raise ConfigError(**describe_violation(error, known="a key of this group")) from error


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
    if key == group and value not in (names := group_options(group)) and not is_own_file(group, value):
        raise ConfigError(
            where,
            got=_SHORT.repr(value) if value else "nothing",
            expected=f"one of {list(names)}" + (", or a file: FILE.yaml" if group in OWN_FILES else ""),
            fix="choose one",
        )


def is_own_file(group: str, value: str) -> bool:
    """Whether `group=value` names a file of the user's: a path, or anything that ends in .yaml."""
    return group in OWN_FILES and ("/" in value or value.endswith(".yaml"))


def resolve_names(overrides: Sequence[str], folder: Path) -> list[str]:
    """The overrides with the paths of names that the folder has a file for: DIR/model/NAME.yaml, DIR/cluster/NAME.yaml.

    ConfigError unless there is such a folder.
    """
    if not folder.is_dir():
        raise ConfigError(
            "--config-dir", got=show_path(folder), expected="a folder with model/ or cluster/", fix="correct the path"
        )
    found = []
    for word in overrides:
        group, _, value = word.partition("=")
        path = folder / group / f"{value}.yaml"
        is_name = group in OWN_FILES and re.fullmatch(r"[\w.-]+", value) is not None and not value.endswith(".yaml")
        found.append(f"{group}={path.resolve()}" if is_name and path.is_file() else word)
    return found


def read_own_file(group: str, path: str) -> Mapping[str, Any]:
    """The values of a model or cluster file. ConfigError names the file and the key."""
    kind, where = MODEL_FILE if group == "model" else CLUSTER_FILE, show_path(path)
    data = parse_section(read_text_file(path, kind), kind, where=where)
    try:
        TypeAdapter(ModelSection if group == "model" else ClusterSection).validate_python(data)
    except ValidationError as error:
        raise ConfigError(**describe_violation(error, where=f"{where}: ", known=f"a key of {kind.what}")) from error
    return data


def _compose(overrides: Sequence[str], cluster: Mapping[str, Any] | None) -> Mapping[str, Any]:
    # Hydra costs 0.2 s to import: only who composes pays.
    from hydra import compose, initialize_config_module
    from hydra.core.config_store import ConfigStore
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    words = []
    for word in overrides:
        group, _, value = word.partition("=")
        if is_own_file(group, value):
            ConfigStore.instance().store(group=group, name=_OF_FILE, node=_literal(read_own_file(group, value)))
            word = f"{group}='{_OF_FILE}'"
        # a key that no file of conf holds is new
        words.append(f"++{word.lstrip('+')}" if word.lstrip("+").startswith(_OPEN) else word)
    if cluster is not None:
        ConfigStore.instance().store(group="cluster", name=_OF_PLAN, node=_literal(cluster))
        words.insert(0, f"cluster='{_OF_PLAN}'")
    try:
        with initialize_config_module("megatron_mosaic.conf", version_base="1.3"):
            data = OmegaConf.to_container(compose("config", overrides=words), resolve=True)
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


def _literal(value: Any) -> Any:
    """The values as OmegaConf takes them literally: in text, `${` would be looked up."""
    if isinstance(value, Mapping):
        return {key: _literal(inner) for key, inner in value.items()}
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", value) if isinstance(value, str) else value
