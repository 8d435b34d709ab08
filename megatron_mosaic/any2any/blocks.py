"""A stage's transformer layers, from megatron-core's blocks, for every layout of a module.

Where Transformer Engine is missing (a CPU), `runtime/layers` has what megatron-core only has there.
"""

from __future__ import annotations

from argparse import Namespace

from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_block import TransformerBlock

from megatron_mosaic.any2any.sizes import require_query_groups
from megatron_mosaic.errors import ConfigError
from megatron_mosaic.parallel_state_ext.rebound import cpu
from megatron_mosaic.plan import ModulePlan, Recompute
from megatron_mosaic.plan.workload import ModuleConfig, Role
from megatron_mosaic.runtime.layers.norms import split_over_tp as split_over_tp
from megatron_mosaic.runtime.layers.specs import LayerRange, layers_of


def build_block(
    config: TransformerConfig,
    mask: AttnMaskType,
    *,
    is_last: bool,
    chunk: int,
    pg_collection: ProcessGroupCollection,
) -> TransformerBlock:
    """The layers of one virtual stage, and the final norm on the last one."""
    chunk_or_none = chunk if config.virtual_pipeline_model_parallel_size else None
    if config.pipeline_model_parallel_size != pg_collection.pp.size():
        ranges = LayerRange(number=chunk, count=config.pipeline_model_parallel_size)
        pg_collection = ProcessGroupCollection(**(vars(pg_collection) | {"pp": ranges}))
    if HAVE_TE and config.transformer_impl == "transformer_engine":
        layer = get_gpt_layer_with_transformer_engine_spec(config.num_moe_experts, config.moe_grouped_gemm)
    else:
        layer = get_gpt_layer_local_spec(config.num_moe_experts, False, normalization=config.normalization)
    layer.submodules.self_attention.params["attn_mask_type"] = mask
    spec = layers_of(layer, config, chunk, pg_collection.pp.rank())
    # pre_process=True on every stage: the hidden states are always an argument.
    return TransformerBlock(
        config, spec, pre_process=True, post_process=is_last, pg_collection=pg_collection, vp_stage=chunk_or_none
    )


def config_from_args(args: Namespace, module: ModuleConfig, placed: ModulePlan) -> TransformerConfig:
    """Megatron's own config of `args`, with this module's sizes and this layout's degrees."""
    layout, full = placed.layout, placed.recompute is Recompute.full
    inside = full or placed.recompute is Recompute.selective  # `whole` is the runtime's matter, not Megatron's
    num_groups, head_size = module.query_groups, module.head_size
    if module.role is Role.backbone:  # of which the command line may say more than the workload does
        num_groups = args.num_query_groups if args.group_query_attention else num_groups
        head_size = args.kv_channels or head_size
    require_query_groups(num_groups, module.num_heads, layout.tp)
    resized = {
        "num_layers": module.num_layers,
        "hidden_size": module.hidden_size,
        "num_attention_heads": module.num_heads,
        "kv_channels": head_size,
        "group_query_attention": num_groups != module.num_heads,
        "num_query_groups": num_groups,
        "ffn_hidden_size": module.ffn_hidden_size,
        "swiglu": (module.gated and not args.quick_geglu) or args.swiglu,
        "seq_length": module.tokens_per_item,
        "num_experts": module.num_experts or None,
        # megatron-core has no biases in experts that are cut over tp; a model must not depend on its layout
        "add_bias_linear": args.add_bias_linear and not module.num_experts,
        "moe_router_topk": module.moe_top_k,
        "moe_router_pre_softmax": module.moe_top_k == 1 or args.moe_router_pre_softmax,  # else a constant
        "moe_ffn_hidden_size": module.ffn_hidden_size if module.num_experts else None,
        # Balancing losses depend on which tokens meet in a microbatch, so on the layout.
        "moe_router_load_balancing_type": "none",
        "moe_token_dispatcher_type": "alltoall",
        "moe_grouped_gemm": bool(module.num_experts) and args.transformer_impl == "transformer_engine",
        "tensor_model_parallel_size": layout.tp,
        "tensor_parallel_num_weight_shards": layout.tp,
        "context_parallel_size": layout.cp,
        "pipeline_model_parallel_size": layout.pp if layout.pp > 1 else layout.vpp,
        "virtual_pipeline_model_parallel_size": layout.vpp if layout.vpp > 1 and layout.pp > 1 else None,
        "pipeline_model_parallel_layout": None,
        "decoder_first_pipeline_num_layers": None,
        "decoder_last_pipeline_num_layers": None,
        "expert_model_parallel_size": layout.ep,
        "expert_tensor_parallel_size": layout.etp if module.num_experts else layout.tp,
        "expert_tensor_parallel_num_weight_shards": layout.etp if module.num_experts else layout.tp,
        "sequence_parallel": placed.sequence_parallel,
        "tp_comm_overlap": False,
        "recompute_granularity": placed.recompute.value if inside else None,
        "recompute_method": "uniform" if full else None,
        "recompute_num_layers": 1 if full else None,
        "recompute_modules": ["core_attn"],
    }
    if args.transformer_impl == "transformer_engine" and not HAVE_TE and cpu.is_cpu():
        raise ConfigError(
            "--transformer-impl",
            got="transformer_engine",
            expected="local: Transformer Engine is not installed",
            fix="leave --transformer-impl out",
        )
    return _checked_config(Namespace(**(vars(args) | resized)), module.name)


def _checked_config(args: Namespace, module: str) -> TransformerConfig:
    """Megatron's config of a module's arguments; what it asserts of them as ConfigError."""
    from megatron.training.arguments import core_transformer_config_from_args

    try:
        return core_transformer_config_from_args(args)
    except (AssertionError, ValueError) as error:
        raise ConfigError(
            f"Megatron's configuration of module {module}",
            got=str(error) or type(error).__name__,
            expected="arguments that fit together and the module's layout",
            fix="change one of them, or leave it out",
        ) from error
