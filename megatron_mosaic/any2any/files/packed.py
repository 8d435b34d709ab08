"""The reference model's samples as two files: an index that every rank reads, and records of which it reads its own.

index.npz      of every sample: where its text is; of every image and drawing: where it is, where it stands in the text
records.bin    text [3, seq_length] int32 (tokens, labels, loss mask), image [16, 4], drawing [2, 16, 4] (noisy,
               clean) float32, each compressed by itself

PackedDigits[i] -> PackedSample: no record is read --collate--> a batch with Unread columns --shard--> records
"""

from __future__ import annotations

import os
import threading
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from megatron_mosaic.any2any.data import DigitsDataset, collate_items
from megatron_mosaic.any2any.files.unread import Unread
from megatron_mosaic.any2any.sizes import GENERATOR, NUM_PATCHES, PATCH_PIXELS, VISION
from megatron_mosaic.errors import ConfigError

INDEX_FILE, RECORDS_FILE = "index.npz", "records.bin"
_IMAGE, _DRAWING = (NUM_PATCHES, PATCH_PIXELS), (2, NUM_PATCHES, PATCH_PIXELS)
_COLUMNS = ("seq_length", "text", "images", "gen")
_TEXT = ("tokens", "labels", "loss_mask")


def write_packed(dataset: DigitsDataset, directory: Path) -> None:
    """Write every sample of the dataset."""
    directory.mkdir(parents=True, exist_ok=True)
    places: dict[str, list[tuple[int, ...]]] = {"text": [], "images": [], "gen": []}
    end = 0
    with (directory / RECORDS_FILE).open("wb") as records:

        def add(array: np.ndarray) -> tuple[int, int]:
            nonlocal end
            record = zlib.compress(array.tobytes())
            records.write(record)
            end += len(record)
            return end - len(record), len(record)

        for number in range(len(dataset)):
            sample = dataset[number]
            text = np.stack([sample[key].numpy().astype(np.int32) for key in _TEXT])
            places["text"].append(add(text))
            for start, image in zip(sample["image_start"].tolist(), sample["images"], strict=True):
                places["images"].append((*add(image.numpy()), number, start))
            drawings = zip(sample["gen_start"].tolist(), sample["gen_noisy"], sample["gen_target"], strict=True)
            for start, noisy, target in drawings:
                places["gen"].append((*add(torch.stack([noisy, target]).numpy()), number, start))
    width = {"text": 2, "images": 4, "gen": 4}
    columns = {key: np.array(rows, dtype=np.int64).reshape(-1, width[key]) for key, rows in places.items()}
    np.savez(directory / INDEX_FILE, seq_length=dataset.sizes.seq_length, **columns)  # type: ignore[arg-type]


class PackedDigits(Dataset["PackedSample"]):
    """Samples of files that `write_packed` wrote; `bytes_read` counts what was read of the records."""

    def __init__(self, directory: Path, seq_length: int) -> None:
        try:
            with np.load(directory / INDEX_FILE, allow_pickle=False) as index:
                columns = {key: index[key] for key in _COLUMNS}
            if not len(columns["text"]):
                raise ValueError("no samples")
            self._file = os.open(directory / RECORDS_FILE, os.O_RDONLY)
        except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile, zlib.error) as error:
            raise ConfigError(
                f"--digits-files {directory.parent}",
                got=f"{directory}: {error}",
                expected=f"{INDEX_FILE} and {RECORDS_FILE} of every split",
                fix="write them with scripts/pack_digits.py",
            ) from error
        if int(columns["seq_length"]) != seq_length:
            raise ConfigError(
                f"--digits-files {directory.parent}",
                got=f"samples of {int(columns['seq_length'])} tokens",
                expected=f"--seq-length {seq_length}",
                fix="give the same --seq-length as when they were written",
            )
        self.seq_length, self.name = seq_length, str(directory)
        self.text, self._images, self._drawings = columns["text"], columns["images"], columns["gen"]
        self._first_image = np.searchsorted(self._images[:, 2], np.arange(len(self.text) + 1))
        self._first_drawing = np.searchsorted(self._drawings[:, 2], np.arange(len(self.text) + 1))
        self.bytes_read = 0
        self._lock = threading.Lock()  # lanes of several threads read at the same time

    def __len__(self) -> int:
        return len(self.text)

    def __getitem__(self, number: int) -> PackedSample:
        """Sample `number`, of which nothing is read yet."""
        if not 0 <= number < len(self):
            raise IndexError(number)
        images = self._images[self._first_image[number] : self._first_image[number + 1]]
        drawings = self._drawings[self._first_drawing[number] : self._first_drawing[number + 1]]
        return PackedSample(self, number, images, drawings)

    def read(self, offset: int, length: int, dtype: type, shape: tuple[int, ...]) -> Tensor:
        """One record."""
        with self._lock:
            self.bytes_read += length
        record = zlib.decompress(os.pread(self._file, length, offset))
        return torch.from_numpy(np.frombuffer(record, dtype=dtype).reshape(shape).copy())


class PackedSample:
    """One sample. `_records`: those that were read, by their offset."""

    def __init__(self, dataset: PackedDigits, number: int, images: np.ndarray, drawings: np.ndarray) -> None:
        self.dataset, self.number, self.images, self.drawings = dataset, number, images, drawings
        self._records: dict[int, Tensor] = {}

    def text(self) -> Tensor:
        """[3, seq_length]: tokens, labels, loss mask."""
        return self._read(self.dataset.text[self.number], np.int32, (len(_TEXT), self.dataset.seq_length))

    def image(self, number: int) -> Tensor:
        """[16, 4]"""
        return self._read(self.images[number], np.float32, _IMAGE)

    def drawing(self, number: int) -> Tensor:
        """[2, 16, 4]: noisy and clean."""
        return self._read(self.drawings[number], np.float32, _DRAWING)

    def _read(self, place: np.ndarray, dtype: type, shape: tuple[int, ...]) -> Tensor:
        offset, length = int(place[0]), int(place[1])
        if offset not in self._records:
            self._records[offset] = self.dataset.read(offset, length, dtype, shape)
        return self._records[offset]


def collate_packed(samples: Sequence[PackedSample]) -> dict[str, Any]:
    """`data.collate` of these samples, of which no record is read: text, images and drawings are Unread."""
    length, dtypes = samples[0].dataset.seq_length, (torch.int64, torch.int64, torch.float32)
    batch: dict[str, Any] = {}
    texts = tuple(f"{each.dataset.name}#{each.number}" for each in samples)
    for column, (key, dtype) in enumerate(zip(_TEXT, dtypes, strict=True)):

        def read_text(row: int, column: int = column, dtype: torch.dtype = dtype) -> Tensor:
            return samples[row].text()[column].to(dtype)

        batch[key] = Unread(row_shape=(length,), dtype=dtype, names=texts, read_row=read_text)
    images = [(each, k) for each in samples for k in range(len(each.images))]
    drawings = [(each, k) for each in samples for k in range(len(each.drawings))]
    for module, places in (
        (VISION, [each.images for each in samples]),
        (GENERATOR, [each.drawings for each in samples]),
    ):
        batch |= collate_items(module, [torch.from_numpy(own[:, 3].copy()) for own in places])
    batch[f"{VISION}/values"] = _items(images, lambda sample, k: sample.image(k))
    batch[f"{GENERATOR}/values"] = _items(drawings, lambda sample, k: sample.drawing(k)[0])
    batch[f"{GENERATOR}/targets"] = _items(drawings, lambda sample, k: sample.drawing(k)[1])
    return batch


def _items(places: list[tuple[PackedSample, int]], read: Any) -> Unread:
    names = tuple(f"{sample.dataset.name}#{sample.number}.{k}" for sample, k in places)
    return Unread(row_shape=_IMAGE, dtype=torch.float32, names=names, read_row=lambda row: read(*places[row]))
