"""The reference model as the runtime sees it: a ModelDefinition."""

from __future__ import annotations

import copy
from argparse import Namespace
from collections.abc import Callable, Sequence
from functools import partial

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import MegatronModule, TransformerConfig
from torch import Tensor

from megatron_mosaic.any2any import sizes as any2any_sizes
from megatron_mosaic.any2any.arguments import mix_from_args, sizes_from_args
from megatron_mosaic.any2any.sizes import GENERATOR, LLM, VISION, Any2AnySizes, DigitsMix
from megatron_mosaic.any2any.stages import BackboneStage, GeneratorStage, VisionStage
from megatron_mosaic.definition import Batch
from megatron_mosaic.errors import PlanError
from megatron_mosaic.plan import Layout
from megatron_mosaic.workload import ModuleConfig, Workload

BuildConfig = Callable[[ModuleConfig, Layout], TransformerConfig]

# Which keys of a batch belong to the items of a module other than the backbone, and which say whose they are.
ITEM_KEYS = {VISION: ("images",), GENERATOR: ("gen_noisy", "gen_target")}
SAMPLE_KEY = {VISION: "image_sample", GENERATOR: "gen_sample"}


class Any2Any:
    """ViT, GPT and image generator over handwritten digits, as a ModelDefinition."""

    loss_names = ("lm loss", "generator loss")

    def __init__(
        self,
        *,
        sizes: Any2AnySizes,
        mix: DigitsMix,
        global_batch_size: int,
        build_config: BuildConfig,
        generator_loss_weight: float = 1.0,
    ) -> None:
        self.sizes = sizes
        self.workload: Workload = any2any_sizes.workload(sizes, global_batch_size, mix)
        self._build_config = build_config
        self._stage_classes: dict[str, Callable[..., MegatronModule]] = {
            VISION: VisionStage,
            LLM: BackboneStage,
            GENERATOR: partial(GeneratorStage, loss_weight=generator_loss_weight),
        }

    @classmethod
    def from_args(cls, args: Namespace) -> Any2Any:
        """The model of Megatron's arguments together with those of `add_any2any_arguments`."""
        return cls(
            sizes=sizes_from_args(args),
            mix=mix_from_args(args),
            global_batch_size=args.global_batch_size,
            build_config=partial(config_from_args, args),
            generator_loss_weight=args.generator_loss_weight,
        )

    def build_stage(
        self, module: str, layout: Layout, stage: int, pg_collection: ProcessGroupCollection
    ) -> MegatronModule:
        for axis in ("cp", "vpp", "ep"):
            if getattr(layout, axis) > 1:
                raise PlanError(
                    f"modules.{module}.layout.{axis}",
                    got=getattr(layout, axis),
                    expected="1: any2any does not split along this axis",
                    fix=f"set {axis}: 1 and raise dp",
                )
        assert pg_collection.pp.rank() == stage, "the layers to build are counted from the pp group's rank"
        return self._stage_classes[module](
            self._build_config(self.workload.by_name[module], layout),
            sizes=self.sizes,
            is_first=stage == 0,
            is_last=stage == layout.pp - 1,
            pg_collection=pg_collection,
        )

    def count_items(self, batch: Batch) -> dict[str, list[int]]:
        num_samples = len(batch["tokens"])
        counts = {
            module: torch.bincount(batch[key], minlength=num_samples).tolist() for module, key in SAMPLE_KEY.items()
        }
        return {VISION: counts[VISION], LLM: [1] * num_samples, GENERATOR: counts[GENERATOR]}

    def select_inputs(self, module: str, batch: Batch, items: Sequence[int]) -> dict[str, Tensor]:
        """For vision `images`, for the generator `gen_noisy` and `gen_target`, [items, 16, 4].

        For the llm `tokens`, `labels`, `loss_mask` [items, S], and where images and drawings stand:
        `image_sample` and `image_start` (`gen_...`), sample by sample in the order of `items`, counted within `items`.
        """
        picked = torch.tensor(items, dtype=torch.long)
        if module != LLM:
            return {key: batch[key][picked] for key in ITEM_KEYS[module]}
        inputs = {key: batch[key][picked] for key in ("tokens", "labels", "loss_mask")}
        lane_idx = torch.full((len(batch["tokens"]),), -1)
        lane_idx[picked] = torch.arange(len(items))
        for kind in ("image", "gen"):
            sample = lane_idx[batch[f"{kind}_sample"]]
            order = torch.argsort(sample, stable=True)
            order = order[sample[order] >= 0]
            inputs |= {f"{kind}_sample": sample[order], f"{kind}_start": batch[f"{kind}_start"][order]}
        return inputs


def config_from_args(args: Namespace, module: ModuleConfig, layout: Layout) -> TransformerConfig:
    """Megatron's own config of `args`, with this module's sizes and this layout's degrees."""
    from megatron.training.arguments import core_transformer_config_from_args

    resized = copy.copy(args)
    for name, value in {
        "num_layers": module.num_layers,
        "hidden_size": module.hidden_size,
        "num_attention_heads": module.num_heads,
        "kv_channels": module.head_size,
        "ffn_hidden_size": module.ffn_hidden_size,
        "seq_length": module.tokens_per_item,
        "tensor_model_parallel_size": layout.tp,
        "tensor_parallel_num_weight_shards": layout.tp,
        "context_parallel_size": layout.cp,
        "pipeline_model_parallel_size": layout.pp,
        "virtual_pipeline_model_parallel_size": None,
        "pipeline_model_parallel_layout": None,
        "decoder_first_pipeline_num_layers": None,
        "decoder_last_pipeline_num_layers": None,
        "expert_model_parallel_size": 1,
        "expert_tensor_parallel_size": layout.tp,
        "expert_tensor_parallel_num_weight_shards": layout.tp,
        "sequence_parallel": False,
        "tp_comm_overlap": False,
    }.items():
        setattr(resized, name, value)
    return core_transformer_config_from_args(resized)
