"""Model files: the YAML form of a Workload, as in conf/model/, checked against one pydantic schema."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import yaml
from pydantic import Field, ValidationError

from megatron_mosaic.errors import ConfigError
from megatron_mosaic.plan.workload import Edge, ModuleConfig, Role, Workload
from megatron_mosaic.plan.yaml_text import MAX_COUNT, Schema, describe_violation, parse_section
from megatron_mosaic.text_file import FileKind, read_text_file, show_path

MODEL_FILE = FileKind(what="a model file like those in conf/model", error=ConfigError, fix="check the path")

Count = Annotated[int, Field(strict=True, ge=1, le=MAX_COUNT)]
OptionalSize = Annotated[int, Field(strict=True, ge=0, le=MAX_COUNT)]
# a mean; beyond either end it is a slip, and counts made of it would not fit in memory
Items = Annotated[float, Field(ge=1e-6, le=1e4)]


class ModuleSection(Schema):
    role: Role
    num_layers: Count
    hidden_size: Count
    num_heads: Count
    ffn_hidden_size: Count
    tokens_per_item: Count
    items_per_sample: Items = 1.0
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


class ModelSection(Schema):
    name: str
    global_batch_size: Count
    modules: dict[str, ModuleSection]
    edges: list[EdgeSection] = []


def make_workload(
    model: ModelSection, *, global_batch_size: int = 0, items_per_sample: Mapping[str, float] | None = None
) -> Workload:
    """The workload of a model, with another batch size or mean number of items where given."""
    items = items_per_sample or {}
    modules = [
        ModuleConfig(name=name, **(section.model_dump() | ({"items_per_sample": items[name]} if name in items else {})))
        for name, section in model.modules.items()
    ]
    return Workload(
        name=model.name,
        modules=tuple(modules),
        edges=tuple(Edge(**edge.model_dump()) for edge in model.edges),
        global_batch_size=global_batch_size or model.global_batch_size,
    )


def load_workload_file(path: str | Path) -> Workload:
    """The workload in a model file. ConfigError names the file and the key."""
    where = show_path(path)
    data = parse_section(read_text_file(path, MODEL_FILE), MODEL_FILE, where=where)
    try:
        return make_workload(ModelSection.model_validate(data))
    except ValidationError as error:
        raise ConfigError(**describe_violation(error, where=f"{where}: ", known="a key of a model file")) from error


def format_workload(workload: Workload) -> str:
    """YAML text; a file of it loads as this workload."""
    defaults = ModuleSection.model_fields
    modules = {
        module.name: {
            key: (module.role.value if key == "role" else getattr(module, key))
            for key, field in defaults.items()
            if field.is_required() or getattr(module, key) != field.default
        }
        for module in workload.modules
    }
    edges = [{key: getattr(edge, key) for key in EdgeSection.model_fields} for edge in workload.edges]
    data = {
        "name": workload.name,
        "global_batch_size": workload.global_batch_size,
        "modules": modules,
        "edges": edges,
    }
    return yaml.safe_dump(data, sort_keys=False, default_flow_style=None, width=120)
