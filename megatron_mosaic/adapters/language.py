"""A GPT as stages, whatever model it is part of; and what an adapter says of its modules' sizes to a plan."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron.core.models.gpt import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import MegatronModule, TransformerConfig

from megatron_mosaic.adapters.stages import LLM, LanguageStage
from megatron_mosaic.errors import PlanError
from megatron_mosaic.parallel_state_ext.boundaries.items import padded_length
from megatron_mosaic.plan import ModulePlan, Plan
from megatron_mosaic.plan.workload import ModuleConfig, Role
from megatron_mosaic.runtime.layers.specs import layers_of, relayout


def sizes_of(name: str, role: Role, config: TransformerConfig, plan: Plan, tokens: int, **more: Any) -> ModuleConfig:
    """A module's sizes. `tokens`: of an item, without what the plan's layout pads."""
    placed = plan.modules.get(name)
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
        tokens_per_item=tokens if placed is None else int(padded_length(placed, tokens)),
        **more,
    )


def sizes_of_language(
    config: TransformerConfig, plan: Plan, *, max_length: int, vocab_size: int, tied: bool, frozen: bool
) -> ModuleConfig:
    """The sizes of a GPT, the backbone."""
    return sizes_of(
        LLM,
        Role.backbone,
        config,
        plan,
        max_length,
        causal=True,
        vocab_size=vocab_size,
        untied_output=not tied,
        frozen=frozen,
    )


def require_language_layout(config: TransformerConfig, plan: Plan, *, tied: bool) -> None:
    """PlanError for layouts of the GPT that fit its sizes and cannot be built."""
    llm = plan.modules[LLM]
    relayout(config, llm, LLM)
    if tied and llm.layout.pp > 1:
        raise PlanError(
            f"modules.{LLM}.layout.pp",
            got=llm.layout.pp,
            expected="1: the script ties embeddings and output weights, which stand on two stages",
            fix="set pp: 1, or untie them",
        )


def build_language(
    given: Mapping[str, Any],
    placed: ModulePlan,
    groups: ProcessGroupCollection,
    chunk: int,
    *,
    is_first: bool,
    is_last: bool,
    frozen: bool,
) -> LanguageStage:
    """A stage of `GPTModel(**given)`."""
    config = relayout(given["config"], placed, LLM)
    model = GPTModel(
        **dict(given)
        | {
            "config": config,
            "transformer_layer_spec": layers_of(given["transformer_layer_spec"], config, chunk, groups.pp.rank()),
            "scatter_embedding_sequence_parallel": False,
            "pre_process": is_first,
            "post_process": is_last,
            "pg_collection": groups,
            "vp_stage": chunk if config.virtual_pipeline_model_parallel_size else None,
        }
    )
    if frozen:
        model.requires_grad_(False)
    return with_groups(LanguageStage(config, model, is_first=is_first, is_last=is_last), groups)


def with_groups[M: MegatronModule](stage: M, groups: ProcessGroupCollection) -> M:
    """The stage; parts without a tp group of their own would ask parallel_state for it when a checkpoint is written."""
    part: MegatronModule
    for part in (p for p in stage.modules() if isinstance(p, MegatronModule)):
        if getattr(part, "tp_group", None) is None:
            part.tp_group = groups.tp
    return stage
