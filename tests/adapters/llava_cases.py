"""pretrain_vlm.py as it is, with images that differ, and plans for it.

Stock mock images are all zero, which hides every error of routing: here each is drawn from its sample's number.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_mosaic.parity.scripts.check import check_script
from megatron_mosaic.parity.verdict import Parity

CHECKOUT = os.environ.get("MEGATRON_LM", "")
needs_checkout = pytest.mark.skipif(not CHECKOUT, reason="no Megatron-LM checkout: set $MEGATRON_LM")
SCRIPT = str(Path(CHECKOUT) / "pretrain_vlm.py")

# Five tokens an image: four patches and the class token.
ARGUMENTS = (
    *("--encoder-num-layers", "2", "--decoder-num-layers", "4", "--hidden-size", "32", "--num-attention-heads", "4"),
    *("--seq-length", "40", "--max-position-embeddings", "64", "--img-h", "28", "--img-w", "28", "--patch-dim", "14"),
    *("--lr", "1e-3", "--tokenizer-type", "NullTokenizer", "--vocab-size", "127", "--split", "949,50,1"),
)
MODERN = (
    *("--swiglu", "--normalization", "RMSNorm", "--position-embedding-type", "rope", "--disable-bias-linear"),
    *("--group-query-attention", "--num-query-groups", "2"),
)
IMAGE_TOKEN = -200


def image_of(index: int) -> torch.Tensor:
    """The image of a sample's number."""
    return torch.randn(3, 28, 28, generator=torch.Generator().manual_seed(1000 + index))


def draw_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """The script's own dataset, with an image for each sample."""
    from megatron.core.datasets.multimodal_dataset import MockMultimodalDataset

    stock = MockMultimodalDataset.__getitem__

    def with_image(self: Any, index: int) -> Any:
        return stock(self, index) | {"image": image_of(int(index))}

    monkeypatch.setattr(MockMultimodalDataset, "__getitem__", with_image)


def any_number_of_images(monkeypatch: pytest.MonkeyPatch, micro_batch_size: int, num_tokens: int = 20) -> None:
    """Another dataset in the script's provider: no image in half of the samples, one to three in the others, anywhere.

    For --dataloader-type external: blocks as one process takes them.
    """
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder

    def sample(index: int) -> dict[str, Any]:
        draw = torch.Generator().manual_seed(index)
        tokens = torch.randint(0, 127, (num_tokens,), generator=draw)
        count = 0 if index % 2 else int(torch.randint(1, 4, (1,), generator=draw))
        tokens[torch.randperm(num_tokens, generator=draw)[:count]] = IMAGE_TOKEN
        mask = (torch.rand(num_tokens, generator=draw) < 0.7) & (tokens != IMAGE_TOKEN)
        labels = torch.randint(0, 127, (num_tokens,), generator=draw)
        images = [image_of(10 * index + i) for i in range(count)]
        return {
            "tokens": tokens,
            "labels": labels,
            "loss_mask": mask.float(),
            "position_ids": torch.arange(num_tokens),
            "images": images,
        }

    def blocks() -> Iterator[dict[str, torch.Tensor]]:
        start = 0
        while True:
            samples = [sample(i) for i in range(start, start + micro_batch_size)]
            images = [image for one in samples for image in one["images"]]
            block = {key: torch.stack([one[key] for one in samples]) for key in samples[0] if key != "images"}
            yield block | {"image": torch.stack(images) if images else torch.zeros(0, 3, 28, 28)}
            start += micro_batch_size

    monkeypatch.setattr(BlendedMegatronDatasetBuilder, "build", lambda self: (blocks(), None, None))


def write_plan(
    directory: Path,
    modules: Mapping[str, str],
    *,
    world_size: int,
    schedule: str = "1f1b",
    more: str = "",
    batch: int = 8,
) -> str:
    """A plan file; `modules`: name -> YAML of its entry."""
    path = directory / "plan.yaml"
    lines = [f"  {name}: {{{entry}}}" for name, entry in modules.items()]
    head = f"mosaic_plan: 1\nworkload: llava\nworld_size: {world_size}\nglobal_batch_size: {batch}\n"
    head += f"micro_batch_size: 2\nschedule: {schedule}\n{more}modules:\n"
    path.write_text(head + "\n".join(lines) + "\n")
    return str(path)


def check(plan: str, *words: str, steps: int = 2) -> Parity:
    """The script under the plan beside the script on one process."""
    return check_script(plan, SCRIPT, steps=steps, megatron_args=[*ARGUMENTS, *words])


def keep_printed(monkeypatch: pytest.MonkeyPatch, directory: Path) -> None:
    """Keep the lines that the last rank of each run logs, for `read_printed`; to be called before a check."""
    from megatron.training import training

    stock = training.print_rank_last

    def printing(line: str) -> None:
        if torch.distributed.get_rank() == torch.distributed.get_world_size() - 1:
            with (directory / f"printed-{os.environ['WORLD_SIZE']}").open("a") as file:
                file.write(f"{line}\n")
        stock(line)

    monkeypatch.setattr(training, "print_rank_last", printing)


def read_printed(directory: Path, world_size: int) -> list[tuple[float, float]]:
    """(lm loss, grad norm) of every step, as the run of so many ranks printed them."""
    text = (directory / f"printed-{world_size}").read_text()
    return [(float(a), float(b)) for a, b in re.findall(r"lm loss: (\S+) \|.* grad norm: (\S+) \|", text)]
