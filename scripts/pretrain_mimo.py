"""A pretrain script around megatron-core's MimoModel, in Megatron's own form: it knows nothing of plans.

    torchrun --nproc-per-node 4 -m megatron_mosaic.run scripts/pretrain_mimo.py ARGS --mosaic-plan plan.yaml

Made-up samples of one image and text, every one of its number alone, so that others can be given the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from megatron.core.enums import ModelType
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.models.mimo import MimoModel, MimoModelConfig
from megatron.core.models.mimo.submodules.vision import VisionModalitySubmodules
from megatron.core.models.vision.clip_vit_model import CLIPViTModel
from megatron.core.models.vision.multimodal_projector import MultimodalProjector
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.training import get_args, pretrain
from megatron.training.argument_utils import pretrain_cfg_container_from_args
from megatron.training.arguments import core_transformer_config_from_args, parse_and_validate_args

MODALITY, IMAGE_TOKEN, VOCABULARY = "images", 127, 128
PATCH, SIDE = 14, 56
ROWS = (SIDE // PATCH) ** 2 + 1  # of an image, with its class token


def build_modality(hidden_size: int, num_layers: int, **given: Any) -> ModuleSpec:
    """The spec of encoder and projection. `given`: process groups."""
    layer = get_gpt_layer_local_spec()
    layer.submodules.self_attention.params["attn_mask_type"] = AttnMaskType.no_mask
    tower = TransformerConfig(
        num_layers=num_layers,
        hidden_size=hidden_size,
        num_attention_heads=4,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        calculate_per_token_loss=True,
        use_cpu_initialization=not torch.cuda.is_available(),
    )
    projection = TransformerConfig(
        num_layers=1, hidden_size=hidden_size, num_attention_heads=4, use_cpu_initialization=True
    )
    sizes = {"patch_dim": PATCH, "img_h": SIDE, "img_w": SIDE}
    encoder = {"transformer_config": tower, "transformer_layer_spec": layer} | sizes
    projector = {
        "config": projection,
        "submodules": MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear),
        "projector_type": "mlp",
        "input_size": hidden_size,
    }
    return ModuleSpec(
        module=VisionModalitySubmodules,
        params=given,
        submodules={
            "encoders": {"clip": ModuleSpec(module=CLIPViTModel, params=encoder | given)},
            "input_projections": [ModuleSpec(module=MultimodalProjector, params=projector | given)],
        },
    )


def build_language(config: TransformerConfig, max_length: int, **given: Any) -> ModuleSpec:
    """The spec of the GPT. `given`: process groups, and whether the ends are there."""
    language = {
        "config": config,
        "transformer_layer_spec": get_gpt_layer_local_spec(),
        "vocab_size": VOCABULARY,
        "max_sequence_length": max_length,
        "position_embedding_type": "rope",
        "share_embeddings_and_output_weights": False,
    }
    return ModuleSpec(module=GPTModel, params=language | given)


def model_provider(pre_process: bool = True, post_process: bool = True, **_: Any) -> MimoModel:
    args = get_args()
    config = MimoModelConfig(
        language_model_spec=build_language(
            core_transformer_config_from_args(args),
            args.max_position_embeddings,
            pre_process=pre_process,
            post_process=post_process,
        ),
        modality_submodules_spec={MODALITY: build_modality(args.hidden_size, args.vision_num_layers)},
        special_token_ids={MODALITY: IMAGE_TOKEN},
    )
    model = MimoModel(config)
    model.pg_collection = ProcessGroupCollection.use_mpu_process_groups()  # asked for by megatron.training 0.19
    return model


def draw_block(numbers: Sequence[int], length: int) -> dict[str, Any]:
    """The samples of these numbers, as a call of the model."""
    rows: dict[str, list[torch.Tensor]] = {"ids": [], "labels": [], "mask": [], "images": []}
    for number in numbers:
        draw = torch.Generator().manual_seed(number)
        ids = torch.randint(0, IMAGE_TOKEN, (length,), generator=draw)
        ids[1 : 1 + ROWS] = IMAGE_TOKEN
        rows["ids"].append(ids)
        rows["labels"].append(torch.randint(0, IMAGE_TOKEN, (length,), generator=draw))
        rows["mask"].append((ids != IMAGE_TOKEN).float() * (torch.rand(length, generator=draw) < 0.8))
        rows["images"].append(torch.randn(3, SIDE, SIDE, generator=draw))
    stacked = {key: torch.stack(values) for key, values in rows.items()}
    return {
        "input_ids": stacked["ids"],
        "position_ids": torch.arange(length).expand(len(numbers), length).contiguous(),
        "attention_mask": None,
        "labels": stacked["labels"],
        "loss_mask": stacked["mask"],
        "modality_inputs": {MODALITY: {"clip": {"x": stacked["images"]}}},
    }


def provide_datasets(_: Any) -> tuple[Any, None, None]:
    args = get_args()

    def blocks() -> Iterator[dict[str, Any]]:
        start = 0
        while True:
            yield draw_block(range(start, start + args.micro_batch_size), args.seq_length)
            start += args.micro_batch_size

    return blocks(), None, None


def loss_func(loss_mask: torch.Tensor, losses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
    total, count = (losses.float().view(-1) * loss_mask.view(-1)).sum(), loss_mask.sum()
    return total, count.to(torch.int), {"lm loss": torch.stack([total.detach(), count])}


def forward_step(iterator: Iterator[dict[str, Any]], model: Any) -> tuple[Any, Any]:
    losses, loss_mask = model(**next(iterator))
    return losses, partial(loss_func, loss_mask)


def add_arguments(parser: Any) -> Any:
    parser.add_argument("--vision-num-layers", type=int, default=2)
    return parser


def main() -> None:
    provide_datasets.is_distributed = True  # type: ignore[attr-defined]
    args = parse_and_validate_args(extra_args_provider=add_arguments, args_defaults={"dataloader_type": "external"})
    container = pretrain_cfg_container_from_args(args)
    pretrain(container, provide_datasets, ModelType.encoder_or_decoder, forward_step, model_provider)


if __name__ == "__main__":
    main()
