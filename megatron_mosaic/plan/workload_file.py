"""Model files: the YAML form of a Workload, as in conf/model/, checked against one pydantic schema."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import AfterValidator, Discriminator, Field, Tag, ValidationError

from megatron_mosaic.errors import ConfigError
from megatron_mosaic.plan.tasks.histogram import Histogram
from megatron_mosaic.plan.tasks.task import LossKind, TaskConfig, TaskLoss, TaskModule, scale_tasks
from megatron_mosaic.plan.workload import Edge, ModuleConfig, Role, Workload, round_tokens
from megatron_mosaic.plan.yaml_text import (
    FORM_NAME,
    FORM_SECTION,
    MAX_AMOUNT,
    MAX_COUNT,
    Schema,
    describe_violation,
    parse_section,
)
from megatron_mosaic.text_file import FileKind, read_text_file, show_path

MODEL_FILE = FileKind(what="a model file like those in conf/model", error=ConfigError, fix="check the path")

Count = Annotated[int, Field(strict=True, ge=1, le=MAX_COUNT)]
OptionalSize = Annotated[int, Field(strict=True, ge=0, le=MAX_COUNT)]
# a mean; beyond either end it is a slip, and counts made of it would not fit in memory
Items = Annotated[float, Field(ge=1e-6, le=1e4)]
Weight = Annotated[float, Field(gt=0, le=MAX_AMOUNT)]


def _with_items(counts: dict[int, float]) -> dict[int, float]:
    if not any(counts):
        raise ValueError("some samples must bring an item")
    return counts


def _form(value: Any) -> str:
    return FORM_SECTION if isinstance(value, Mapping) else FORM_NAME


# value -> how often it is seen in the data, in any unit
ItemCounts = Annotated[
    dict[Annotated[int, Field(ge=0, le=10_000)], Weight],
    Field(min_length=1, max_length=1000),
    AfterValidator(_with_items),
]
TokenCounts = Annotated[dict[Annotated[int, Field(ge=1, le=MAX_COUNT)], Weight], Field(min_length=1, max_length=1000)]
ItemsOrCounts = Annotated[
    Annotated[Items, Tag(FORM_NAME)] | Annotated[ItemCounts, Tag(FORM_SECTION)], Discriminator(_form)
]
TokensOrCounts = Annotated[
    Annotated[Count, Tag(FORM_NAME)] | Annotated[TokenCounts, Tag(FORM_SECTION)], Discriminator(_form)
]

EdgeText = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*->[a-z][a-z0-9_]*$")]  # source->target


class ModuleSection(Schema):
    role: Role
    num_layers: Count
    hidden_size: Count
    num_heads: Count
    ffn_hidden_size: Count
    tokens_per_item: TokensOrCounts  # a number, or value -> weight: how often it is seen
    items_per_sample: ItemsOrCounts = 1.0
    num_query_groups: OptionalSize = 0
    vocab_size: OptionalSize = 0
    input_size: OptionalSize = 0
    output_size: OptionalSize = 0
    gated: bool = False
    causal: bool = False
    num_experts: OptionalSize = 0
    moe_top_k: Count = 2
    shared_expert_size: OptionalSize = 0
    num_dense_layers: OptionalSize = 0
    dense_ffn_size: OptionalSize = 0
    kv_channels: OptionalSize = 0
    q_latent_size: OptionalSize = 0
    kv_latent_size: OptionalSize = 0
    untied_output: bool = False
    num_mtp_layers: OptionalSize = 0
    merge_tokens: Count = 1
    projector_size: OptionalSize = 0
    attention_window: OptionalSize = 0
    num_full_attention_layers: OptionalSize = 0
    frozen: bool = False
    trains_projector: bool = False


class EdgeSection(Schema):
    source: str
    target: str
    rows_per_item: Count
    width: Count


class TaskModuleSection(Schema):
    items_per_sample: Items | None = None  # None: as the module says
    tokens_per_item: Count | None = None


class TaskLossSection(Schema):
    kind: LossKind
    modules: list[str]


class TaskSection(Schema):
    samples: Count
    modules: dict[str, TaskModuleSection]
    edges: list[EdgeText] | None = None  # None: all between its modules
    loss: TaskLossSection


class ModelSection(Schema):
    name: str
    global_batch_size: Count
    modules: dict[str, ModuleSection]
    edges: list[EdgeSection] = []
    tasks: dict[str, TaskSection] = {}


def make_workload(
    model: ModelSection, *, global_batch_size: int = 0, items_per_sample: Mapping[str, float] | None = None
) -> Workload:
    """The workload of a model, with another batch size or mean number of items where given: a mean alone takes the
    place of a histogram."""
    items = items_per_sample or {}
    modules = [
        _make_module(name, section.model_dump() | ({"items_per_sample": items[name]} if name in items else {}))
        for name, section in model.modules.items()
    ]
    batch = global_batch_size or model.global_batch_size
    return Workload(
        name=model.name,
        modules=tuple(modules),
        edges=tuple(Edge(**edge.model_dump()) for edge in model.edges),
        global_batch_size=batch,
        tasks=scale_tasks(_make_tasks(model), model.global_batch_size, batch),
    )


def _make_module(name: str, values: dict[str, Any]) -> ModuleConfig:
    if isinstance(values["items_per_sample"], Mapping):
        found = Histogram.of(values["items_per_sample"])
        values |= {"items_per_sample": found.mean, "items_histogram": found}
    if isinstance(values["tokens_per_item"], Mapping):
        found = Histogram.of(values["tokens_per_item"])
        values |= {"tokens_per_item": round_tokens(found, values["merge_tokens"]), "tokens_histogram": found}
    return ModuleConfig(name=name, **values)


def _make_tasks(model: ModelSection) -> list[TaskConfig]:
    """As the file has them, which shares out its own batch."""
    return [
        TaskConfig(
            name=name,
            samples=task.samples,
            modules=tuple(
                TaskModule(
                    name=used,
                    items_per_sample=section.items_per_sample or 0.0,
                    tokens_per_item=section.tokens_per_item or 0,
                )
                for used, section in task.modules.items()
            ),
            edges=_edges_of(task, model),
            loss=TaskLoss(kind=task.loss.kind, modules=tuple(task.loss.modules)),
        )
        for name, task in model.tasks.items()
    ]


def _edges_of(task: TaskSection, model: ModelSection) -> tuple[tuple[str, str], ...]:
    """Those that it names, or all between its modules."""
    if task.edges is None:
        pairs = [(edge.source, edge.target) for edge in model.edges]
        return tuple((a, b) for a, b in pairs if a in task.modules and b in task.modules)
    return tuple((a, b) for a, _, b in (text.partition("->") for text in task.edges))


def load_workload_file(path: str | Path) -> Workload:
    """The workload in a model file. ConfigError names the file and the key."""
    where = show_path(path)
    data = parse_section(read_text_file(path, MODEL_FILE), MODEL_FILE, where=where)
    try:
        return make_workload(ModelSection.model_validate(data))
    except ValidationError as error:
        raise ConfigError(**describe_violation(error, where=f"{where}: ", known="a key of a model file")) from error


def _value_of(module: ModuleConfig, key: str) -> Any:
    """What a file says at a key."""
    histograms = {"items_per_sample": module.items_histogram, "tokens_per_item": module.tokens_histogram}
    if histogram := histograms.get(key):
        return dict(histogram.bins)
    return module.role.value if key == "role" else getattr(module, key)


def format_workload(workload: Workload) -> str:
    """YAML text; a file of it loads as this workload."""
    defaults = ModuleSection.model_fields
    modules = {
        module.name: {
            key: _value_of(module, key)
            for key, field in defaults.items()
            if field.is_required() or _value_of(module, key) != field.default
        }
        for module in workload.modules
    }
    edges = [{key: getattr(edge, key) for key in EdgeSection.model_fields} for edge in workload.edges]
    data: dict[str, Any] = {
        "name": workload.name,
        "global_batch_size": workload.global_batch_size,
        "modules": modules,
        "edges": edges,
    }
    if workload.tasks:
        data["tasks"] = {task.name: _format_task(task) for task in workload.tasks}
    return yaml.safe_dump(data, sort_keys=False, default_flow_style=None, width=120)


def _format_task(task: TaskConfig) -> dict[str, Any]:
    sizes = ("items_per_sample", "tokens_per_item")
    return {
        "samples": task.samples,
        "modules": {
            used.name: {key: getattr(used, key) for key in sizes if getattr(used, key)} for used in task.modules
        },
        "edges": [f"{source}->{target}" for source, target in task.edges],
        "loss": {"kind": task.loss.kind.value, "modules": list(task.loss.modules)},
    }
