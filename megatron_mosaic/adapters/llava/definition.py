"""A LLaVAModel as a ModelDefinition: its workload from the arguments that the script builds it with, and its stages."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from megatron.core.models.multimodal.llava_model import LLaVAModel
from megatron.core.models.vision.clip_vit_model import get_num_image_embeddings
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import MegatronModule

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
from megatron_mosaic.adapters.llava.batch import VISION, ImageTokens, place_call
from megatron_mosaic.adapters.recording import ModelRecord
from megatron_mosaic.adapters.single_process import SingleProcess
from megatron_mosaic.adapters.stages import LLM, LanguageStage, Tower, VisionStage
from megatron_mosaic.definition import Batch
from megatron_mosaic.errors import ConfigError, PlanError
from megatron_mosaic.parallel_state_ext.boundaries.items import Items, Links, Shard
from megatron_mosaic.plan import ModulePlan, Plan, validate_plan
from megatron_mosaic.plan.workload import Edge, Role, Workload
from megatron_mosaic.runtime.layers.specs import layers_of, relayout, relayout_projection, stages_of

WORKLOAD = "llava"
TOWER, PROJECTION, LANGUAGE = PARTS = ("vision_model", "vision_projection", "language_model")
_CLIP = ("clip", "siglip", "internvit")
# Options of LLaVAModel that stages would have to know, and their values without effect.
_WITHOUT: Mapping[str, object] = {
    "tile_tags": None,
    "sound_model": None,
    "sound_projection": None,
    "dynamic_resolution": False,
    "hybrid_layer_pattern": None,
    "temporal_patch_dim": 1,
    "separate_video_embedder": False,
    "fp16_lm_cross_entropy": False,
}


class Llava:
    """ModelDefinition of a script whose model_provider builds a LLaVAModel."""

    loss_names = ("lm loss",)

    def __init__(self, record: ModelRecord, plan: Plan) -> None:
        self._arguments, self._frozen = record.arguments, record.frozen
        _require_known(record.arguments)
        self.tokens = _image_tokens(record.arguments)
        self.workload = _workload(record, self.tokens, plan)
        validate_plan(plan, self.workload)
        _require_layouts(record.arguments, plan, self.tokens.images)

    def build_stage(
        self, module: str, placed: ModulePlan, stage: int, pg_collection: ProcessGroupCollection, chunk: int = 0
    ) -> MegatronModule:
        layout = placed.layout
        ends = (stage, chunk) == (0, 0), (stage, chunk) == (layout.pp - 1, layout.vpp - 1)
        groups = stages_of(pg_collection, placed, chunk)
        build = self._build_vision if module == VISION else self._build_language
        return build(placed, groups, chunk, *ends)

    def list_items(self, batch: Batch) -> dict[str, Items]:
        return tokens.list_items(batch, [self.tokens.images])

    def list_links(self, edge: Edge, batch: Batch) -> Links:
        return tokens.list_links(batch, self.tokens.images)

    def select_inputs(self, module: str, batch: Batch, shard: Shard) -> dict[str, Any]:
        return tokens.select_inputs(module, batch, shard, [self.tokens.images])

    def _build_vision(
        self, placed: ModulePlan, groups: ProcessGroupCollection, chunk: int, is_first: bool, is_last: bool
    ) -> VisionStage:
        given = dict(self._arguments)
        config = relayout(given["vision_transformer_config"], placed, VISION)
        projection = relayout_projection(given["vision_projection_config"], placed, VISION)
        model: MegatronModule = LLaVAModel(
            **given
            | {
                "vision_transformer_config": config,
                "vision_transformer_layer_spec": layers_of(
                    given["vision_transformer_layer_spec"], config, chunk, groups.pp.rank()
                ),
                "vision_projection_config": projection,
                "add_encoder": True,
                "add_decoder": False,
                "pre_process": True,
                "post_process": True,
                "pg_collection": groups,
                "vp_stage": chunk if config.virtual_pipeline_model_parallel_size else None,
            }
        )
        self._freeze(model)
        if not is_last:
            model.vision_projection = None
        images = self.tokens.images
        tower = Tower(encoder=TOWER, projection=PROJECTION, num_dropped=images.dropped, merged=images.merged)
        return with_groups(VisionStage(config, model, tower, is_first=is_first, is_last=is_last), groups)

    def _build_language(
        self, placed: ModulePlan, groups: ProcessGroupCollection, chunk: int, is_first: bool, is_last: bool
    ) -> LanguageStage:
        given = self._arguments
        language = {
            "config": given["language_transformer_config"],
            "transformer_layer_spec": given["language_transformer_layer_spec"],
            "vocab_size": given["language_vocab_size"],
            "max_sequence_length": given["language_max_sequence_length"],
            "parallel_output": given["parallel_output"],
            "position_embedding_type": given["language_position_embedding_type"],
            "rotary_percent": given["language_rotary_percent"],
            "rotary_base": given["language_rotary_base"],
            "rope_scaling": given["language_rope_scaling"],
            "rope_scaling_factor": given["language_rope_scaling_factor"],
            "share_embeddings_and_output_weights": given["share_embeddings_and_output_weights"],
        }
        frozen = self._frozen[LANGUAGE]
        return build_language(language, placed, groups, chunk, is_first=is_first, is_last=is_last, frozen=frozen)

    def _freeze(self, model: MegatronModule) -> None:
        for part in (TOWER, PROJECTION):
            if self._frozen[part]:
                getattr(model, part).requires_grad_(False)


def build(
    record: ModelRecord, plan: Plan, args: argparse.Namespace, alone: SingleProcess, forward_step: Callable[..., Any]
) -> tuple[Llava, ScriptReader]:
    """Definition and reader of one script. ConfigError or PlanError for what would not be exact."""
    refuse_flags(args)
    definition = Llava(record, plan)
    place = partial(place_call, tokens=definition.tokens)
    return definition, ScriptReader(alone, forward_step, LLaVAModel.forward, place, [definition.tokens.images])


def module_of(name: str) -> str:
    """The module of a parameter of the whole model."""
    return LLM if name.startswith(f"{LANGUAGE}.") else VISION


LLAVA = Adapter(
    kind=LLaVAModel,
    tops=PARTS,
    list_parts=lambda _: PARTS,
    build=build,
    module_of=module_of,
    config_of=lambda model, module: model.get_submodule(TOWER if module == VISION else LANGUAGE).config,
)


def _require_known(given: Mapping[str, Any]) -> None:
    """ConfigError for an option of the model that the stages do not know."""
    for key, without in _WITHOUT.items():
        if given[key] != without:
            raise ConfigError(
                f"LLaVAModel({key}=...)",
                got=given[key],
                expected=f"{without}: under a plan of several modules nothing else is exact yet",
                fix="leave the option out that sets it",
            )
    kind = given["vision_transformer_config"].vision_model_type
    if not kind.startswith(_CLIP):
        raise ConfigError(
            "LLaVAModel: vision_model_type",
            got=kind,
            expected=f"a tower of upstream's CLIPViTModel: {', '.join(_CLIP)}",
            fix="choose one of these",
        )
    language = getattr(given["language_transformer_config"], "language_model_type", "")
    if language.startswith(("nemotron5-hybrid", "nemotron6-moe")):
        raise ConfigError("LLaVAModel: language_model_type", got=language, expected="a GPT", fix="choose a GPT")


def _require_layouts(given: Mapping[str, Any], plan: Plan, images: ItemRows) -> None:
    """PlanError for layouts that fit the sizes and cannot be built."""
    if VISION in plan.modules:
        vision = plan.modules[VISION]
        relayout(given["vision_transformer_config"], vision, VISION)
        if images.merged and (vision.layout.cp > 1 or vision.sequence_parallel):
            raise PlanError(
                f"modules.{VISION}",
                got=f"{vision.layout}, sequence_parallel {vision.sequence_parallel}",
                expected="cp 1 without sequence parallelism: pixel shuffling merges tokens that other ranks would have",
                fix="use tp, pp or dp",
            )
    tied = given["share_embeddings_and_output_weights"]
    require_language_layout(given["language_transformer_config"], plan, tied=tied)


def _image_tokens(given: Mapping[str, Any]) -> ImageTokens:
    kind, shuffled = given["vision_transformer_config"].vision_model_type, given["pixel_shuffle"]
    num_class = 0 if kind == "siglip" else 1

    def count(drop: bool, shuffle: bool) -> int:
        sizes = (given["img_h"], given["img_w"], given["patch_dim"])
        return int(get_num_image_embeddings(*sizes, kind, drop, num_class, shuffle))

    dropped = given["drop_vision_class_token"]
    images = ItemRows(
        module=VISION,
        rows=count(dropped, shuffled),
        tokens=count(False, False),
        dropped=num_class if dropped else 0,
        merged=shuffled,
    )
    longest = given["language_max_sequence_length"]
    return ImageTokens(images=images, image_token=given["image_token_index"], max_length=longest)


def _workload(record: ModelRecord, image_tokens: ImageTokens, plan: Plan) -> Workload:
    given, frozen = record.arguments, record.frozen
    language, tower = given["language_transformer_config"], given["vision_transformer_config"]
    vision = sizes_of(
        VISION,
        Role.encoder,
        tower,
        plan,
        image_tokens.images.tokens,
        output_size=language.hidden_size,
        frozen=frozen[TOWER],
        trains_projector=frozen[TOWER] and not frozen[PROJECTION],
    )
    llm = sizes_of_language(
        language,
        plan,
        max_length=image_tokens.max_length,
        vocab_size=given["language_vocab_size"],
        tied=given["share_embeddings_and_output_weights"],
        frozen=frozen[LANGUAGE],
    )
    edge = Edge(source=VISION, target=LLM, rows_per_item=image_tokens.images.rows, width=language.hidden_size)
    return Workload(name=WORKLOAD, modules=(vision, llm), edges=(edge,))
