"""A MimoModel as a ModelDefinition: its workload and its stages from the specs that the script builds it with."""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from megatron.core.models.gpt import GPTModel
from megatron.core.models.mimo.config import MimoModelConfig
from megatron.core.models.mimo.model import MimoModel
from megatron.core.models.mimo.submodules.base import ModalitySubmodules
from megatron.core.models.vision.clip_vit_model import CLIPViTModel
from megatron.core.models.vision.multimodal_projector import MultimodalProjector
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import MegatronModule, TransformerConfig
from megatron.core.transformer.spec_utils import ModuleSpec

from megatron_mosaic.adapters.adapter import Adapter
from megatron_mosaic.adapters.arguments import refuse_flags
from megatron_mosaic.adapters.batches import tokens
from megatron_mosaic.adapters.batches.reader import ScriptReader
from megatron_mosaic.adapters.batches.tokens import ItemRows
from megatron_mosaic.adapters.language import (
    build_language,
    require_language_layout,
    sizes_of,
    sizes_of_language,
    with_groups,
)
from megatron_mosaic.adapters.mimo.batch import Modality, place_call
from megatron_mosaic.adapters.recording import ModelRecord
from megatron_mosaic.adapters.single_process import SingleProcess
from megatron_mosaic.adapters.stages import LLM, Parts, Tower, VisionStage
from megatron_mosaic.definition import Batch
from megatron_mosaic.errors import ConfigError
from megatron_mosaic.parallel_state_ext.boundaries.items import Items, Links, Shard
from megatron_mosaic.plan import ModulePlan, Plan, validate_plan
from megatron_mosaic.plan.workload import Edge, Role, Workload
from megatron_mosaic.runtime.layers.specs import layers_of, relayout, relayout_projection, stages_of

WORKLOAD = "mimo"
LANGUAGE, SUBMODULES, ENCODERS, PROJECTIONS = PARTS = (
    "language_model",
    "modality_submodules",
    "encoders",
    "input_projections",
)
_FIRST = "0"  # of the projections: there is one
_AS_UPSTREAM = ("encode", "combine_embeddings", "project_embeddings", "forward")


class Mimo:
    """ModelDefinition of a script whose model_provider builds a MimoModel."""

    loss_names = ("lm loss",)

    def __init__(self, record: ModelRecord, plan: Plan) -> None:
        self._config: MimoModelConfig = record.arguments["mimo_config"]
        self._frozen = record.frozen
        _require_known(self._config)
        self.modalities = {name: _modality(name, self._config) for name in self._config.modality_submodules_spec}
        self._kinds = [modality.items for modality in self.modalities.values()]
        self.workload = self._describe(plan)
        validate_plan(plan, self.workload)
        given = self._config.language_model_spec.params
        require_language_layout(given["config"], plan, tied=_is_tied(given))
        for name in self.modalities:
            relayout(self._encoder(name).params["transformer_config"], plan.modules[name], name)

    def build_stage(
        self, module: str, placed: ModulePlan, stage: int, pg_collection: ProcessGroupCollection, chunk: int = 0
    ) -> MegatronModule:
        layout = placed.layout
        is_first, is_last = (stage, chunk) == (0, 0), (stage, chunk) == (layout.pp - 1, layout.vpp - 1)
        groups = stages_of(pg_collection, placed, chunk)
        if module == LLM:
            given, frozen = self._config.language_model_spec.params, self._frozen[LANGUAGE]
            return build_language(given, placed, groups, chunk, is_first=is_first, is_last=is_last, frozen=frozen)
        return self._build_encoder(module, placed, groups, chunk, is_first, is_last)

    def list_items(self, batch: Batch) -> dict[str, Items]:
        return tokens.list_items(batch, self._kinds)

    def list_links(self, edge: Edge, batch: Batch) -> Links:
        return tokens.list_links(batch, self.modalities[edge.source].items)

    def select_inputs(self, module: str, batch: Batch, shard: Shard) -> dict[str, Any]:
        return tokens.select_inputs(module, batch, shard, self._kinds)

    def _build_encoder(
        self, module: str, placed: ModulePlan, groups: ProcessGroupCollection, chunk: int, is_first: bool, is_last: bool
    ) -> VisionStage:
        given = self._encoder(module).params
        config = relayout(given["transformer_config"], placed, module)
        encoder = CLIPViTModel(
            **given
            | {
                "transformer_config": config,
                "transformer_layer_spec": layers_of(given["transformer_layer_spec"], config, chunk, groups.pp.rank()),
                "pg_collection": groups,
                "vp_stage": chunk if config.virtual_pipeline_model_parallel_size else None,
            }
        )
        encoder_name, projection_name = _part_names(module, self.modalities[module].encoder)
        encoder.requires_grad_(not self._frozen[encoder_name])
        inside: dict[str, MegatronModule] = {ENCODERS: Parts(config, {self.modalities[module].encoder: encoder})}
        specs = self._config.modality_submodules_spec[module].submodules.get(PROJECTIONS)
        if specs and is_last:
            own = relayout_projection(specs[0].params["config"], placed, module)
            projection = MultimodalProjector(**specs[0].params | {"config": own, "pg_collection": groups})
            projection.requires_grad_(not self._frozen[projection_name])
            inside[PROJECTIONS] = Parts(config, {_FIRST: projection})
        model = Parts(config, {SUBMODULES: Parts(config, {module: Parts(config, inside)})})
        tower = Tower(encoder=encoder_name, projection=projection_name if specs else "")
        return with_groups(VisionStage(config, model, tower, is_first=is_first, is_last=is_last), groups)

    def _encoder(self, module: str) -> ModuleSpec:
        (spec,) = self._config.modality_submodules_spec[module].submodules[ENCODERS].values()
        return spec

    def _describe(self, plan: Plan) -> Workload:
        given = self._config.language_model_spec.params
        language = given["config"]
        modules, edges = [], []
        for name, modality in self.modalities.items():
            encoder, projection = _part_names(name, modality.encoder)
            frozen, has_projection = self._frozen[encoder], projection in self._frozen
            trains_projector = frozen and has_projection and not self._frozen[projection]
            config = self._encoder(name).params["transformer_config"]
            modules.append(
                sizes_of(
                    name,
                    Role.encoder,
                    config,
                    plan,
                    modality.items.tokens,
                    output_size=language.hidden_size,
                    frozen=frozen,
                    trains_projector=trains_projector,
                )
            )
            edges.append(Edge(source=name, target=LLM, rows_per_item=modality.items.rows, width=language.hidden_size))
        llm = sizes_of_language(
            language,
            plan,
            max_length=given["max_sequence_length"],
            vocab_size=given["vocab_size"],
            tied=_is_tied(given),
            frozen=self._frozen[LANGUAGE],
        )
        return Workload(name=WORKLOAD, modules=(*modules, llm), edges=tuple(edges))


def build(
    record: ModelRecord, plan: Plan, args: argparse.Namespace, alone: SingleProcess, forward_step: Callable[..., Any]
) -> tuple[Mimo, ScriptReader]:
    """Definition and reader of one script. ConfigError or PlanError for what would not be exact."""
    refuse_flags(args)
    definition = Mimo(record, plan)
    modalities = list(definition.modalities.values())
    special = list(record.arguments["mimo_config"].special_token_ids.values())
    place = partial(place_call, modalities=modalities, special_tokens=special)
    kinds = [modality.items for modality in modalities]
    return definition, ScriptReader(alone, forward_step, MimoModel.forward, place, kinds)


def list_parts(arguments: Mapping[str, Any]) -> list[str]:
    """The language model, every encoder and every projection."""
    parts = [LANGUAGE]
    for name, spec in arguments["mimo_config"].modality_submodules_spec.items():
        inside = spec.submodules or {}
        for encoder in inside.get(ENCODERS, {}):
            found, projection = _part_names(name, encoder)
            parts += [found, projection] if inside.get(PROJECTIONS) else [found]
    return list(dict.fromkeys(parts))


def module_of(name: str) -> str:
    """The module of a parameter of the whole model."""
    first, _, rest = name.partition(".")
    return rest.partition(".")[0] if first == SUBMODULES else LLM


def config_of(model: MegatronModule, module: str) -> TransformerConfig:
    """The config of a module's layers."""
    if module == LLM:
        return model.get_submodule(LANGUAGE).config
    (encoder,) = model.get_submodule(f"{SUBMODULES}.{module}.{ENCODERS}").children()
    return encoder.config


MIMO = Adapter(
    kind=MimoModel,
    tops=(LANGUAGE, SUBMODULES),
    list_parts=list_parts,
    build=build,
    module_of=module_of,
    config_of=config_of,
)


def _part_names(module: str, encoder: str) -> tuple[str, str]:
    """Where a modality's encoder and its projection stand in the whole model."""
    return f"{SUBMODULES}.{module}.{ENCODERS}.{encoder}", f"{SUBMODULES}.{module}.{PROJECTIONS}.{_FIRST}"


def _modality(name: str, config: MimoModelConfig) -> Modality:
    ((encoder, spec),) = config.modality_submodules_spec[name].submodules[ENCODERS].items()
    given = _arguments_of(CLIPViTModel, spec)
    patches = (given["img_h"] // given["patch_dim"]) * (given["img_w"] // given["patch_dim"])
    rows = patches + (given["class_token_len"] if given["add_class_token"] else 0)
    return Modality(
        items=ItemRows(module=name, rows=rows, tokens=rows),
        token=config.special_token_ids[name],
        encoder=encoder,
        size=(3, given["img_h"], given["img_w"]),
    )


def _arguments_of(kind: type, spec: ModuleSpec) -> dict[str, Any]:
    """All arguments of a constructor, the spec's and the defaults of the others."""
    signature = inspect.signature(vars(kind)["__init__"])
    defaults = {key: each.default for key, each in signature.parameters.items() if each.default is not each.empty}
    return defaults | spec.params


def _is_tied(given: Mapping[str, Any]) -> bool:
    return bool(given.get("share_embeddings_and_output_weights", False))


def _require_known(config: MimoModelConfig) -> None:
    """ConfigError for what a MimoModel may be made of and the stages do not know."""
    if config.module_to_grid_map:
        raise _unknown("module_to_grid_map", "a map", "None: the plan says where modules run")
    if config.kv_format != "sbhd":
        raise _unknown("kv_format", config.kv_format, "sbhd")
    if config.language_model_spec.module is not GPTModel:
        raise _unknown("language_model_spec", config.language_model_spec.module.__name__, "GPTModel")
    if config.language_model_spec.params["config"].num_moe_experts:
        raise _unknown("language_model_spec", "experts", "a dense GPTModel")
    if LLM in config.modality_submodules_spec or not config.modality_submodules_spec:
        names = list(config.modality_submodules_spec)
        raise _unknown("modality_submodules_spec", names, f"one modality or more, none of them named {LLM}")
    for name, spec in config.modality_submodules_spec.items():
        where, inside = f"modality_submodules_spec[{name!r}]", spec.submodules or {}
        if any(getattr(spec.module, key) is not getattr(ModalitySubmodules, key) for key in _AS_UPSTREAM):
            raise _unknown(where, spec.module.__name__, "a class that encodes and projects as ModalitySubmodules does")
        encoders, projections = inside.get(ENCODERS, {}), inside.get(PROJECTIONS, [])
        if [each.module for each in encoders.values()] != [CLIPViTModel]:
            raise _unknown(where, [each.module.__name__ for each in encoders.values()], "one encoder, a CLIPViTModel")
        if [each.module for each in projections] not in ([], [MultimodalProjector]):
            found = [each.module.__name__ for each in projections]
            raise _unknown(where, found, "one projection, a MultimodalProjector, or none")
        if set(inside) - {ENCODERS, PROJECTIONS}:
            raise _unknown(where, sorted(inside), f"{ENCODERS} and {PROJECTIONS} alone")
        if name not in config.special_token_ids:
            raise _unknown("special_token_ids", list(config.special_token_ids), f"a token of {name}")


def _unknown(where: str, got: object, expected: str) -> ConfigError:
    return ConfigError(
        f"MimoModel: {where}",
        got=got,
        expected=f"{expected}; under a plan of several modules nothing else is exact yet",
        fix="change the model, or write a ModelDefinition like megatron_mosaic/any2any",
    )
