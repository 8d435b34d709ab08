"""The reference model's data: scikit-learn's 1,797 handwritten digits, with sentences made up about them.

Sample i is a pure function of (seed, split, i). Its kinds (`.` has no loss, `*` has):

    one image   <begin> <image>x16 | this picture shows a seven <end>
                   .        .                 *
    drawing     <begin> [<image>x16 caption] draw a seven <drawing>x16
                   .                              .          -> the generator's loss
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import StrEnum
from functools import cache

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from megatron_mosaic.any2any import captions as text
from megatron_mosaic.any2any.sizes import (
    GENERATOR,
    IMAGE_SIZE,
    LLM,
    NUM_PATCHES,
    PATCH_PIXELS,
    PATCH_SIZE,
    VISION,
    Any2AnySizes,
    DigitsMix,
)
from megatron_mosaic.errors import ConfigError

# Share of the target in the generator's noisy input, next to unit noise that keeps the variance. So small that the
# denoiser cannot see the digit by itself: which one to draw has to come from the llm.
SIGNAL = 0.25


class Split(StrEnum):
    """Which images a sample may show: of every ten, eight train, one valid, one test."""

    train = "train"
    valid = "valid"
    test = "test"


@cache
def load_images(split: Split) -> tuple[Tensor, np.ndarray]:
    """Images of the split [num_images, 16, 4], pixels in [-1, 1], patches row by row; and their digits."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ConfigError(
            "any2any: data",
            got=f"no scikit-learn ({error})",
            expected="scikit-learn, which carries the handwritten digits",
            fix="pip install 'megatron-mosaic[demo]'",
        ) from error
    digits = load_digits()
    last = np.arange(len(digits.target)) % 10
    keep = {Split.train: last < 8, Split.valid: last == 8, Split.test: last == 9}[split]
    pixels = torch.tensor(digits.images[keep] / 8 - 1, dtype=torch.float32)
    side = IMAGE_SIZE // PATCH_SIZE
    patches = pixels.reshape(-1, side, PATCH_SIZE, side, PATCH_SIZE).transpose(2, 3)
    return patches.reshape(-1, NUM_PATCHES, PATCH_PIXELS), digits.target[keep]


class DigitsDataset(Dataset[dict[str, Tensor]]):
    """`num_samples` samples over the images of one split; see `SampleWriter.finish` for what a sample holds."""

    def __init__(self, split: Split | str, *, sizes: Any2AnySizes, mix: DigitsMix, num_samples: int, seed: int) -> None:
        if sizes.vocab_size < len(text.VOCABULARY):
            raise ConfigError(
                "any2any: vocab size",
                got=sizes.vocab_size,
                expected=f"at least the {len(text.VOCABULARY)} words of the data",
                fix="raise --vocab-size",
            )
        self.split, self.sizes, self.mix, self.num_samples, self.seed = Split(split), sizes, mix, num_samples, seed
        self.images, self.digits = load_images(self.split)
        self.images_of_digit = [np.flatnonzero(self.digits == digit) for digit in range(10)]

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, idx: int) -> dict[str, Tensor]:
        if not 0 <= idx < self.num_samples:
            raise IndexError(idx)
        rng = np.random.default_rng([self.seed, list(Split).index(self.split), idx])
        writer = SampleWriter(self.sizes.seq_length)
        kind = rng.random()
        for frac, write in (
            (self.mix.text_only_frac, self._write_text),
            (self.mix.two_image_frac, self._write_two_images),
            (self.mix.generate_frac, self._write_drawing),
        ):
            if kind < frac:
                write(rng, writer)
                break
            kind -= frac
        else:
            self._write_one_image(rng, writer)
        return writer.finish()

    def _write_text(self, rng: np.random.Generator, writer: SampleWriter) -> None:
        first = int(rng.integers(10))
        writer.add_caption(text.render_sentence(rng.choice(text.TEXT_ONLY), *range(first, first + 4)))

    def _write_one_image(self, rng: np.random.Generator, writer: SampleWriter) -> int:
        digit = self._add_image(rng, writer)
        writer.add_caption(text.render_sentence(rng.choice(text.ONE_IMAGE), digit))
        return digit

    def _write_two_images(self, rng: np.random.Generator, writer: SampleWriter) -> None:
        digits = self._add_image(rng, writer), self._add_image(rng, writer)
        writer.add_caption(text.render_sentence(rng.choice(text.TWO_IMAGES), *digits))

    def _write_drawing(self, rng: np.random.Generator, writer: SampleWriter) -> None:
        if rng.random() < 0.5:
            digit = self._write_one_image(rng, writer)
            prompt, step = text.DRAW_AFTER_IMAGE[rng.integers(len(text.DRAW_AFTER_IMAGE))]
            digit = (digit + step) % 10
        else:
            digit = int(rng.integers(10))
            prompt = text.render_sentence(rng.choice(text.DRAW), digit)
        target = self.images[rng.choice(self.images_of_digit[digit])]
        noise = torch.from_numpy(rng.standard_normal(target.shape, dtype=np.float32))
        writer.add_prompt(prompt)
        writer.add_drawing(SIGNAL * target + (1 - SIGNAL**2) ** 0.5 * noise, target)

    def _add_image(self, rng: np.random.Generator, writer: SampleWriter) -> int:
        idx = int(rng.integers(len(self.digits)))
        writer.add_image(self.images[idx])
        return int(self.digits[idx])


class SampleWriter:
    """Writes one sample from left to right."""

    def __init__(self, seq_length: int) -> None:
        self.seq_length = seq_length
        self.tokens, self.is_caption = [text.BEGIN], [False]
        self.images: list[Tensor] = []
        self.image_start: list[int] = []
        self.gen_noisy: list[Tensor] = []
        self.gen_target: list[Tensor] = []
        self.gen_start: list[int] = []

    def add_caption(self, sentence: str) -> None:
        self._add(text.encode(sentence) + [text.END], is_caption=True)

    def add_prompt(self, sentence: str) -> None:
        self._add(text.encode(sentence), is_caption=False)

    def add_image(self, image: Tensor) -> None:
        self.images.append(image)
        self.image_start.append(len(self.tokens))
        self._add([text.IMAGE] * NUM_PATCHES, is_caption=False)

    def add_drawing(self, noisy: Tensor, target: Tensor) -> None:
        self.gen_noisy.append(noisy)
        self.gen_target.append(target)
        self.gen_start.append(len(self.tokens))
        self._add([text.DRAWING] * NUM_PATCHES, is_caption=False)

    def _add(self, tokens: list[int], *, is_caption: bool) -> None:
        self.tokens.extend(tokens)
        self.is_caption.extend([is_caption] * len(tokens))

    def finish(self) -> dict[str, Tensor]:
        """tokens, labels, loss_mask [seq_length]; images, gen_noisy, gen_target [n, 16, 4]; starts [n].

        Position p predicts token p+1, and counts where that token is a word of a caption.
        """
        num_tokens = len(self.tokens)
        if num_tokens > self.seq_length:
            raise ConfigError(
                "any2any: seq length", got=self.seq_length, expected=f"at least {num_tokens}", fix="raise --seq-length"
            )
        tokens = torch.full((self.seq_length,), text.PAD)
        tokens[:num_tokens] = torch.tensor(self.tokens)
        loss_mask = torch.zeros(self.seq_length)
        loss_mask[: num_tokens - 1] = torch.tensor(self.is_caption[1:], dtype=torch.float32)
        return {
            "tokens": tokens,
            "labels": torch.where(loss_mask > 0, tokens.roll(-1), text.PAD),
            "loss_mask": loss_mask,
            "images": _stack_patches(self.images),
            "image_start": torch.tensor(self.image_start, dtype=torch.long),
            "gen_noisy": _stack_patches(self.gen_noisy),
            "gen_target": _stack_patches(self.gen_target),
            "gen_start": torch.tensor(self.gen_start, dtype=torch.long),
        }


def collate(samples: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The batch of these samples, with the keys of definition.py: text stacked, images one after the other."""
    batch = {key: torch.stack([sample[key] for sample in samples]) for key in ("tokens", "labels", "loss_mask")}
    for module, values, kind in ((VISION, "images", "image"), (GENERATOR, "gen_noisy", "gen")):
        batch |= collate_items(module, [sample[f"{kind}_start"] for sample in samples])
        batch[f"{module}/values"] = torch.cat([sample[values] for sample in samples])
    batch[f"{GENERATOR}/targets"] = torch.cat([sample["gen_target"] for sample in samples])
    return batch


def collate_items(module: str, starts: Sequence[Tensor]) -> dict[str, Tensor]:
    """Whose the items of vision or the generator are, and the edge of its rows, by where they stand in each sample."""
    counts, start = torch.tensor([len(own) for own in starts]), torch.cat(list(starts))
    owner = torch.repeat_interleave(torch.arange(len(starts)), counts)
    lengths = torch.full_like(owner, NUM_PATCHES)
    item_end, sample_end = (torch.arange(len(owner)), torch.zeros_like(owner)), (owner, start)
    ends = (item_end, sample_end) if module == VISION else (sample_end, item_end)
    edge = f"{VISION}>{LLM}" if module == VISION else f"{LLM}>{GENERATOR}"
    return {
        f"{module}/samples": owner,
        f"{module}/tokens": lengths,
        edge: torch.stack([*ends[0], *ends[1], lengths]),
    }


def _stack_patches(images: list[Tensor]) -> Tensor:
    return torch.stack(images) if images else torch.empty(0, NUM_PATCHES, PATCH_PIXELS)
