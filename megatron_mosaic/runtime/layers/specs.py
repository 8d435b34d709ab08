"""A layer's spec and its config for one layout of a module.

Whoever describes the layers (a stock script, the reference model) describes them for one process. Where Transformer
Engine is missing, two pieces of the spec do not know cp and sequence parallelism, and ours take their place.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_block import (
    LayerNormImpl,
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)

from megatron_mosaic.errors import PlanError
from megatron_mosaic.plan import ModulePlan, Recompute
from megatron_mosaic.runtime.layers.attention import ContextParallelAttention
from megatron_mosaic.runtime.layers.norms import build_norm


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


def stages_of(groups: ProcessGroupCollection, placed: ModulePlan, chunk: int) -> ProcessGroupCollection:
    """The groups as Megatron's blocks want them: virtual stages of one rank stand for stages of a pipeline."""
    if placed.layout.pp > 1 or placed.layout.vpp == 1:
        return groups
    ranges = LayerRange(number=chunk, count=placed.layout.vpp)
    return ProcessGroupCollection(**(vars(groups) | {"pp": ranges}))


def relayout(
    config: TransformerConfig, placed: ModulePlan, module: str, num_heads: int | None = None
) -> TransformerConfig:
    """A config of one process with this layout's degrees and recomputation. PlanError if Megatron refuses them."""
    layout, full = placed.layout, placed.recompute is Recompute.full
    inside = full or placed.recompute is Recompute.selective  # `whole` is the runtime's matter
    etp = layout.etp if config.num_moe_experts else layout.tp
    changes = {
        "tensor_model_parallel_size": layout.tp,
        "tensor_parallel_num_weight_shards": layout.tp,
        "context_parallel_size": layout.cp,
        "pipeline_model_parallel_size": layout.pp if layout.pp > 1 else layout.vpp,
        "virtual_pipeline_model_parallel_size": layout.vpp if layout.vpp > 1 and layout.pp > 1 else None,
        "expert_model_parallel_size": layout.ep,
        "expert_tensor_parallel_size": etp,
        "expert_tensor_parallel_num_weight_shards": etp,
        "sequence_parallel": placed.sequence_parallel,
        "pipeline_dtype": config.params_dtype,
        "recompute_granularity": placed.recompute.value if inside else None,
        "recompute_method": "uniform" if full else None,
        "recompute_num_layers": 1 if full else None,
        "recompute_modules": ["core_attn"],
        "calculate_per_token_loss": True,  # or gradient buffers would divide by the module's own dp
    }
    if num_heads is not None:
        changes |= {"num_attention_heads": num_heads, "num_query_groups": num_heads}
    try:
        own = replace(config, **changes)  # type: ignore[arg-type]
    except (AssertionError, ValueError) as error:
        raise PlanError(
            f"modules.{module}.layout",
            got=f"{layout}: {error}",
            expected="a layout that Megatron's configuration takes",
            fix="change the layout, or the script's arguments",
        ) from error
    known = {field.name for field in fields(config)}
    vars(own).update({key: value for key, value in vars(config).items() if key not in known})  # what a script has added
    return own


def relayout_projection(config: TransformerConfig, placed: ModulePlan, module: str) -> TransformerConfig:
    """`relayout` for layers that stand on the last stage alone and have no heads, whatever their config says."""
    last = replace(placed.layout, pp=1, vpp=1, dp=placed.layout.dp * placed.layout.pp)
    return relayout(config, replace(placed, layout=last), module, num_heads=placed.layout.tp)


def layers_of(
    layer: ModuleSpec, config: TransformerConfig, chunk: int, pp_rank: int
) -> ModuleSpec | TransformerBlockSubmodules:
    """The layers of one virtual stage, all of this spec, able to run in the config's layout.

    Transformer Engine's pieces, and Apex's norms, know cp and sequence parallelism themselves.
    """
    parts = layer.submodules
    attention, changes = parts.self_attention, {}
    if config.context_parallel_size > 1 and attention.submodules.core_attention is DotProductAttention:
        inner = replace(attention.submodules, core_attention=ContextParallelAttention)
        changes["self_attention"] = replace(attention, submodules=inner)
    norms = ("input_layernorm", "pre_mlp_layernorm")
    changes |= {key: build_norm for key in norms if getattr(parts, key) is WrappedTorchNorm}
    if not changes:
        return layer
    own = replace(layer, submodules=replace(parts, **changes))
    final = build_norm if norms[0] in changes else LayerNormImpl
    count = get_num_layers_to_build(config, chunk if config.virtual_pipeline_model_parallel_size else None, pp_rank)
    return TransformerBlockSubmodules(layer_specs=[own] * count, layer_norm=final)
