"""A LLaVAModel as a ModelDefinition: its workload from the arguments that the script builds it with, and its stages."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from megatron.core.models.gpt import GPTModel
from megatron.core.models.multimodal.llava_model import LLaVAModel
from megatron.core.models.vision.clip_vit_model import get_num_image_embeddings
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import MegatronModule, TransformerConfig

from megatron_mosaic.adapters.adapter import Adapter
from megatron_mosaic.adapters.llava import batch as batches
from megatron_mosaic.adapters.llava.batch import ImageRows, LlavaReader
from megatron_mosaic.adapters.llava.stages import LLM, VISION, LanguageStage, VisionStage
from megatron_mosaic.adapters.recording import ModelRecord
from megatron_mosaic.adapters.single_process import SingleProcess
from megatron_mosaic.definition import Batch
from megatron_mosaic.errors import ConfigError, PlanError
from megatron_mosaic.parallel_state_ext.boundaries.items import Items, Links, Shard, padded_length
from megatron_mosaic.plan import ModulePlan, Plan, validate_plan
from megatron_mosaic.plan.workload import Edge, ModuleConfig, Role, Workload
from megatron_mosaic.runtime.layers.specs import layers_of, relayout, stages_of

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
        self.images = _image_rows(record.arguments)
        self.workload = _workload(record, self.images, plan)
        validate_plan(plan, self.workload)
        _require_layouts(record.arguments, plan, self.images)

    def build_stage(
        self, module: str, placed: ModulePlan, stage: int, pg_collection: ProcessGroupCollection, chunk: int = 0
    ) -> MegatronModule:
        layout = placed.layout
        ends = (stage, chunk) == (0, 0), (stage, chunk) == (layout.pp - 1, layout.vpp - 1)
        groups = stages_of(pg_collection, placed, chunk)
        build = self._build_vision if module == VISION else self._build_language
        return build(placed, groups, chunk, *ends)

    def list_items(self, batch: Batch) -> dict[str, Items]:
        return batches.list_items(batch, self.images)

    def list_links(self, edge: Edge, batch: Batch) -> Links:
        return batches.list_links(batch, self.images)

    def select_inputs(self, module: str, batch: Batch, shard: Shard) -> dict[str, Any]:
        return batches.select_inputs(module, batch, shard, self.images)

    def _build_vision(
        self, placed: ModulePlan, groups: ProcessGroupCollection, chunk: int, is_first: bool, is_last: bool
    ) -> VisionStage:
        given = dict(self._arguments)
        config = relayout(given["vision_transformer_config"], placed, VISION)
        ends = replace(placed.layout, pp=1, vpp=1, dp=placed.layout.dp * placed.layout.pp)
        projection = relayout(given["vision_projection_config"], replace(placed, layout=ends), VISION)
        model = LLaVAModel(
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
        stage = VisionStage(config, model, is_first=is_first, is_last=is_last, num_dropped=self.images.dropped)
        return _with_groups(stage, groups)

    def _build_language(
        self, placed: ModulePlan, groups: ProcessGroupCollection, chunk: int, is_first: bool, is_last: bool
    ) -> LanguageStage:
        given = self._arguments
        config = relayout(given["language_transformer_config"], placed, LLM)
        model = GPTModel(
            config=config,
            transformer_layer_spec=layers_of(given["language_transformer_layer_spec"], config, chunk, groups.pp.rank()),
            vocab_size=given["language_vocab_size"],
            max_sequence_length=given["language_max_sequence_length"],
            parallel_output=given["parallel_output"],
            position_embedding_type=given["language_position_embedding_type"],
            rotary_percent=given["language_rotary_percent"],
            rotary_base=given["language_rotary_base"],
            rope_scaling=given["language_rope_scaling"],
            rope_scaling_factor=given["language_rope_scaling_factor"],
            share_embeddings_and_output_weights=given["share_embeddings_and_output_weights"],
            scatter_embedding_sequence_parallel=False,
            pre_process=is_first,
            post_process=is_last,
            pg_collection=groups,
            vp_stage=chunk if config.virtual_pipeline_model_parallel_size else None,
        )
        if self._frozen[LANGUAGE]:
            model.requires_grad_(False)
        return _with_groups(LanguageStage(config, model, is_first=is_first, is_last=is_last), groups)

    def _freeze(self, model: LLaVAModel) -> None:
        for part in (TOWER, PROJECTION):
            if self._frozen[part]:
                getattr(model, part).requires_grad_(False)


def build(
    record: ModelRecord, plan: Plan, args: argparse.Namespace, alone: SingleProcess, forward_step: Callable[..., Any]
) -> tuple[Llava, LlavaReader]:
    """Definition and reader of one script. ConfigError or PlanError for what would not be exact."""
    for flag in ("use_packed_sequence", "decoder_tp_comm_overlap"):
        if getattr(args, flag, False):
            name = f"--{flag.replace('_', '-')}"
            raise ConfigError(
                name,
                got="set",
                expected="left out: not supported under a plan of several modules",
                fix=f"leave {name} out",
            )
    definition = Llava(record, plan)
    return definition, LlavaReader(definition.images, alone, forward_step)


def module_of(name: str) -> str:
    """The module of a parameter of the whole model."""
    return LLM if name.startswith(f"{LANGUAGE}.") else VISION


LLAVA = Adapter(
    kind=LLaVAModel,
    parts=PARTS,
    build=build,
    module_of=module_of,
    config_of={VISION: TOWER, LLM: LANGUAGE},
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


def _require_layouts(given: Mapping[str, Any], plan: Plan, images: ImageRows) -> None:
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
    llm = plan.modules[LLM]
    relayout(given["language_transformer_config"], llm, LLM)
    if given["share_embeddings_and_output_weights"] and llm.layout.pp > 1:
        raise PlanError(
            f"modules.{LLM}.layout.pp",
            got=llm.layout.pp,
            expected="1: the script ties embeddings and output weights, which stand on two stages",
            fix="set pp: 1, or untie them",
        )


def _image_rows(given: Mapping[str, Any]) -> ImageRows:
    kind, shuffled = given["vision_transformer_config"].vision_model_type, given["pixel_shuffle"]
    num_class = 0 if kind == "siglip" else 1

    def count(drop: bool, shuffle: bool) -> int:
        sizes = (given["img_h"], given["img_w"], given["patch_dim"])
        return int(get_num_image_embeddings(*sizes, kind, drop, num_class, shuffle))

    dropped = given["drop_vision_class_token"]
    tokens = count(False, False)
    return ImageRows(
        rows=count(dropped, shuffled),
        tokens=tokens,
        dropped=num_class if dropped else 0,
        merged=shuffled,
        image_token=given["image_token_index"],
        max_length=given["language_max_sequence_length"],
    )


def _workload(record: ModelRecord, images: ImageRows, plan: Plan) -> Workload:
    given, frozen = record.arguments, record.frozen
    language, tower = given["language_transformer_config"], given["vision_transformer_config"]

    def tokens(module: str, count: int) -> int:
        return int(padded_length(plan.modules[module], count)) if module in plan.modules else count

    projector_alone = frozen[TOWER] and not frozen[PROJECTION]
    vision = _sizes(
        VISION,
        Role.encoder,
        tower,
        tokens_per_item=tokens(VISION, images.tokens),
        output_size=language.hidden_size,
        frozen=frozen[TOWER],
        trains_projector=projector_alone,
    )
    llm = _sizes(
        LLM,
        Role.backbone,
        language,
        tokens_per_item=tokens(LLM, images.max_length),
        causal=True,
        vocab_size=given["language_vocab_size"],
        untied_output=not given["share_embeddings_and_output_weights"],
        frozen=frozen[LANGUAGE],
    )
    edge = Edge(source=VISION, target=LLM, rows_per_item=images.rows, width=language.hidden_size)
    return Workload(name=WORKLOAD, modules=(vision, llm), edges=(edge,))


def _sizes(name: str, role: Role, config: TransformerConfig, **more: Any) -> ModuleConfig:
    return ModuleConfig(
        name=name,
        role=role,
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        num_heads=config.num_attention_heads,
        ffn_hidden_size=config.ffn_hidden_size,
        num_query_groups=config.num_query_groups or 0,
        kv_channels=config.kv_channels,
        gated=config.gated_linear_unit,
        **more,
    )


def _with_groups[M: MegatronModule](stage: M, groups: ProcessGroupCollection) -> M:
    """The stage; parts without a tp group of their own would ask parallel_state for it when a checkpoint is written."""
    part: MegatronModule
    for part in (p for p in stage.modules() if isinstance(p, MegatronModule)):
        if getattr(part, "tp_group", None) is None:
            part.tp_group = groups.tp
    return stage
