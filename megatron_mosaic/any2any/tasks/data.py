"""Samples of the three tasks. Sample i of a task is a pure function of (seed, split, task, i).

    caption   <begin> <image>x16 | this picture shows a seven <end>     vision -> llm, loss on the words
    pairs     an image; `this picture shows a seven`                    vision, text: which sentence is whose
    draw      <begin> draw a seven <drawing>x16                         llm -> generator, loss on the pixels

Ten pairs in a row show ten different digits: no sentence fits another's image.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from megatron_mosaic.any2any import captions as words
from megatron_mosaic.any2any.data import SIGNAL, SampleWriter, Split, collate, load_images
from megatron_mosaic.any2any.sizes import NUM_PATCHES, VISION
from megatron_mosaic.errors import ConfigError
from megatron_mosaic.plan.workload import Workload

CAPTION, PAIRS, DRAW = "caption", "pairs", "draw"
TEXT = "text"  # the tower of sentences


class TaskSamples:
    """Batches of the tasks of a workload like conf/model/any2any-tasks.yaml. ConfigError for other tasks."""

    def __init__(self, workload: Workload, split: Split, *, seed: int) -> None:
        self.workload, self.split, self.seed = workload, split, seed
        self._write = {CAPTION: self._caption, PAIRS: self._pairs, DRAW: self._draw}
        unknown = [task.name for task in workload.tasks if task.name not in self._write]
        if unknown or not workload.tasks:
            raise ConfigError(
                f"workload {workload.name!r}: tasks",
                got=unknown or "none",
                expected=f"some of {list(self._write)}: there is data for no others",
                fix="use model=any2any-tasks",
            )
        self._images, self._digits = load_images(split)
        self._of_digit = [np.flatnonzero(self._digits == digit) for digit in range(10)]

    def step(self, number: int) -> dict[str, dict[str, Tensor]]:
        """Task -> batch of a step: as many samples of each as the workload says."""
        found = {}
        for task in self.workload.tasks:
            first = number * task.samples
            found[task.name] = self.batch(task.name, range(first, first + task.samples))
        return found

    def batch(self, task: str, samples: range) -> dict[str, Tensor]:
        """These samples of a task, with the keys of any2any/definition.py."""
        rngs = [np.random.default_rng([self.seed, list(Split).index(self.split), *task.encode(), i]) for i in samples]
        return self._write[task](samples, rngs)

    def _caption(self, samples: range, rngs: list[np.random.Generator]) -> dict[str, Tensor]:
        found = []
        for rng in rngs:
            writer, idx = self._writer(), int(rng.integers(len(self._digits)))
            writer.add_image(self._images[idx])
            writer.add_caption(words.render_sentence(rng.choice(words.ONE_IMAGE), int(self._digits[idx])))
            found.append(writer.finish())
        return collate(found)

    def _draw(self, samples: range, rngs: list[np.random.Generator]) -> dict[str, Tensor]:
        found = []
        for rng in rngs:
            writer, digit = self._writer(), int(rng.integers(10))
            target = self._image_of(digit, rng)
            noise = torch.from_numpy(rng.standard_normal(target.shape, dtype=np.float32))
            writer.add_prompt(words.render_sentence(rng.choice(words.DRAW), digit))
            writer.add_drawing(SIGNAL * target + (1 - SIGNAL**2) ** 0.5 * noise, target)
            found.append(writer.finish())
        return collate(found)

    def _pairs(self, samples: range, rngs: list[np.random.Generator]) -> dict[str, Tensor]:
        length, width = (getattr(self.workload.by_name[TEXT], key) for key in ("tokens_per_item", "input_size"))
        count = torch.arange(len(samples))
        images = torch.stack([self._image_of(i % 10, rng) for i, rng in zip(samples, rngs)])
        sentences = [
            words.encode(words.render_sentence(rng.choice(words.ONE_IMAGE), i % 10)) for i, rng in zip(samples, rngs)
        ]
        values = torch.zeros(len(samples), length, width)
        for row, tokens in zip(values, sentences):
            row[torch.arange(len(tokens)), torch.tensor(tokens)] = 1.0
        lengths = {
            VISION: torch.full_like(count, NUM_PATCHES),
            TEXT: torch.tensor([len(tokens) for tokens in sentences]),
        }
        return {
            f"{VISION}/samples": count,
            f"{VISION}/tokens": lengths[VISION],
            f"{VISION}/values": images,
            f"{TEXT}/samples": count,
            f"{TEXT}/tokens": lengths[TEXT],
            f"{TEXT}/values": values,
            **{
                f"{tower}>{PAIRS}": torch.stack([count, torch.zeros_like(count)] * 2 + [rows])
                for tower, rows in lengths.items()
            },
        }

    def _writer(self) -> SampleWriter:
        return SampleWriter(self.workload.by_name["llm"].tokens_per_item)

    def _image_of(self, digit: int, rng: np.random.Generator) -> Tensor:
        return self._images[rng.choice(self._of_digit[digit])]
