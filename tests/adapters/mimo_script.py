"""A pretrain script around megatron-core's own MimoModel: two modalities of images, and a GPT.

As upstream's examples/mimo/train.py, without Transformer Engine and files. A sample has no image or several, of each
modality, and every image differs.
"""

from __future__ import annotations

from collections.abc import Iterator
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

VOCABULARY = 128
TOKENS = {"images": 100, "drawings": 101}
SIZES = {"images": 28, "drawings": 14}  # of a side, in patches of 14
ROWS = {"images": 5, "drawings": 2}  # with a class token
LENGTH = 32


def build_modality(name: str, hidden_size: int) -> ModuleSpec:
    layer = get_gpt_layer_local_spec()
    layer.submodules.self_attention.params["attn_mask_type"] = AttnMaskType.no_mask
    tower = TransformerConfig(
        num_layers=2, hidden_size=24, num_attention_heads=2, hidden_dropout=0.0, attention_dropout=0.0
    )
    projection = TransformerConfig(num_layers=1, hidden_size=hidden_size, num_attention_heads=1, ffn_hidden_size=48)
    encoder = {
        "transformer_config": tower,
        "transformer_layer_spec": layer,
        "patch_dim": 14,
        "img_h": SIZES[name],
        "img_w": SIZES[name],
    }
    projector = {
        "config": projection,
        "submodules": MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear),
        "projector_type": "mlp",
        "input_size": 24,
    }
    return ModuleSpec(
        module=VisionModalitySubmodules,
        submodules={
            "encoders": {"clip": ModuleSpec(module=CLIPViTModel, params=encoder)},
            "input_projections": [ModuleSpec(module=MultimodalProjector, params=projector)],
        },
    )


def model_provider(pre_process: bool = True, post_process: bool = True, **_: Any) -> MimoModel:
    args = get_args()
    language = {
        "config": core_transformer_config_from_args(args),
        "transformer_layer_spec": get_gpt_layer_local_spec(normalization=args.normalization),
        "vocab_size": VOCABULARY,
        "max_sequence_length": args.max_position_embeddings,
        "pre_process": pre_process,
        "post_process": post_process,
        "position_embedding_type": args.position_embedding_type,
    }
    config = MimoModelConfig(
        language_model_spec=ModuleSpec(module=GPTModel, params=language),
        modality_submodules_spec={name: build_modality(name, args.hidden_size) for name in TOKENS},
        special_token_ids=TOKENS,
    )
    model = MimoModel(config)
    model.pg_collection = ProcessGroupCollection.use_mpu_process_groups()  # asked for by megatron.training 0.19
    if args.freeze_images:
        for parameter in model.modality_submodules["images"].encoders["clip"].parameters():
            parameter.requires_grad = False
    return model


def draw_sample(index: int) -> dict[str, Any]:
    """Text, and images of both modalities: none in a third of the samples, up to two of each in the others."""
    draw = torch.Generator().manual_seed(index)
    ids = torch.randint(0, 100, (LENGTH,), generator=draw)
    images: dict[str, list[torch.Tensor]] = {name: [] for name in TOKENS}
    at = int(torch.randint(0, 4, (1,), generator=draw))
    for name in TOKENS:
        for _ in range(int(torch.randint(0, 3, (1,), generator=draw)) if index % 3 else 0):
            ids[at : at + ROWS[name]] = TOKENS[name]
            at += ROWS[name] + 2
            images[name].append(torch.randn(3, SIZES[name], SIZES[name], generator=draw))
    mask = (ids < 100).float() * (torch.rand(LENGTH, generator=draw) < 0.8)
    return {"ids": ids, "labels": torch.randint(0, 100, (LENGTH,), generator=draw), "mask": mask, "images": images}


def list_blocks(size: int) -> Iterator[dict[str, Any]]:
    start = 0
    while True:
        samples = [draw_sample(index) for index in range(start, start + size)]
        block = {
            "input_ids": torch.stack([each["ids"] for each in samples]),
            "position_ids": torch.arange(LENGTH).expand(size, LENGTH).contiguous(),
            "labels": torch.stack([each["labels"] for each in samples]),
            "loss_mask": torch.stack([each["mask"] for each in samples]),
            "attention_mask": None,
            "modality_inputs": {},
        }
        for name in TOKENS:
            images = [image for each in samples for image in each["images"][name]]
            if images:
                block["modality_inputs"][name] = {"clip": {"x": torch.stack(images)}}
        yield block
        start += size


def provide_datasets(_: Any) -> tuple[Any, None, None]:
    return list_blocks(get_args().micro_batch_size), None, None


def loss_func(loss_mask: torch.Tensor, losses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
    total, count = (losses.float().view(-1) * loss_mask.view(-1)).sum(), loss_mask.sum()
    return total, count.to(torch.int), {"lm loss": torch.stack([total.detach(), count])}


def forward_step(iterator: Iterator[dict[str, Any]], model: Any) -> tuple[Any, Any]:
    losses, loss_mask = model(**next(iterator))
    return losses, partial(loss_func, loss_mask)


def add_arguments(parser: Any) -> Any:
    parser.add_argument("--freeze-images", action="store_true")
    return parser


if __name__ == "__main__":
    provide_datasets.is_distributed = True  # type: ignore[attr-defined]
    parsed = parse_and_validate_args(extra_args_provider=add_arguments, args_defaults={})
    container = pretrain_cfg_container_from_args(parsed)
    pretrain(container, provide_datasets, ModelType.encoder_or_decoder, forward_step, model_provider)
