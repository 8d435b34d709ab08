"""A stage's transformer layers, from megatron-core's blocks, for every layout of a module.

Where Transformer Engine is missing (a CPU), two pieces that megatron-core only has there are made here: attention whose
tokens are split over cp ranks, and norms that work on a tp rank's share of the tokens.
"""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass, replace
from typing import Any

import torch
from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_block import (
    TransformerBlock,
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from torch import Tensor, nn

from megatron_mosaic.any2any.sizes import require_query_groups
from megatron_mosaic.errors import ConfigError
from megatron_mosaic.parallel_state_ext.rebound import cpu
from megatron_mosaic.plan import ModulePlan, Recompute
from megatron_mosaic.plan.workload import ModuleConfig, Role


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerRange:
    """Virtual stages of one rank (pp 1) are to Megatron's blocks, which know virtual stages of pipelines only, stages
    of a pipeline: they ask their group which layers are theirs, and nothing else."""

    number: int
    count: int

    def rank(self) -> int:
        return self.number

    def size(self) -> int:
        return self.count


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
        spec: Any = layer
    else:
        layer = get_gpt_layer_local_spec(config.num_moe_experts, False, normalization=config.normalization)
        attention = layer.submodules.self_attention
        if config.context_parallel_size > 1:
            parts = replace(attention.submodules, core_attention=ContextParallelAttention)
            attention = replace(attention, submodules=parts)
        norms = dict.fromkeys(("input_layernorm", "pre_mlp_layernorm"), build_norm)
        layer = replace(layer, submodules=replace(layer.submodules, self_attention=attention, **norms))
        num_layers = get_num_layers_to_build(config, chunk_or_none, pg_collection.pp.rank())
        spec = TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=build_norm)
    layer.submodules.self_attention.params["attn_mask_type"] = mask
    # pre_process=True on every stage: the hidden states are always an argument.
    return TransformerBlock(
        config, spec, pre_process=True, post_process=is_last, pg_collection=pg_collection, vp_stage=chunk_or_none
    )


def build_norm(config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **kwargs: Any) -> nn.Module:
    """torch's norm, its parameters marked where each tp rank sees its own tokens only."""
    plain = replace(config, sequence_parallel=False)
    norm: nn.Module = WrappedTorchNorm(plain, hidden_size, eps, **kwargs)
    return split_over_tp(norm, config)


def split_over_tp[M: nn.Module](module: M, config: TransformerConfig) -> M:
    """The module, its parameters marked for a sum over tp: with sequence parallelism each rank sees its own tokens."""
    parameter: nn.Parameter
    for parameter in module.parameters():
        parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
    return module


class ContextParallelAttention(DotProductAttention):
    """Attention of this cp rank's queries to the keys of all: keys and values are gathered, their gradients scattered.

    A rank's tokens are chunks r and 2*cp-1-r of 2*cp (batch.Shard).
    """

    def __init__(self, config: TransformerConfig, *args: Any, pg_collection: ProcessGroupCollection, **kwargs: Any):
        alone = replace(config, context_parallel_size=1)
        super().__init__(alone, *args, pg_collection=pg_collection, **kwargs)
        self._cp = pg_collection.cp

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """query, key, value [S/cp, N, heads, size]; `attention_mask` [N, 1, 1, S], True where a key is padding."""
        mask = attention_mask
        if (attn_mask_type or self.attn_mask_type) is AttnMaskType.causal:
            later = self._later_keys(len(key) * self._cp.size(), key.device)
            mask = later if mask is None else mask | later
        return super().forward(
            query, self._gather(key), self._gather(value), mask, attn_mask_type=AttnMaskType.no_mask, **kwargs
        )

    def _gather(self, own: Tensor) -> Tensor:
        """[S, ...] in the order of tokens, from every cp rank's [S/cp, ...]."""
        size = self._cp.size()
        pieces = gather_from_sequence_parallel_region(own, group=self._cp).chunk(2 * size)
        return torch.cat([*pieces[0::2], *reversed(pieces[1::2])])

    def _later_keys(self, length: int, device: torch.device) -> Tensor:
        """[1, 1, S/cp, S]: True where the key comes after the query."""
        positions = torch.arange(length, device=device)
        chunks = positions.chunk(2 * self._cp.size())
        own = torch.cat([chunks[self._cp.rank()], chunks[-1 - self._cp.rank()]])
        return (positions > own[:, None])[None, None]


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
