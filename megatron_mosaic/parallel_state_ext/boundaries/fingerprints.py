"""Fingerprints of messages: both ends work them out from their own samples, and the receiver compares.

    batch of a microbatch --fingerprint_samples--> Metadata.content
    contents, edge, units, row numbers --mark--> 8 bytes that travel before the rows

A rank that read other samples, or that takes other rows of them than its peer sends, is found at the first message.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from megatron_mosaic.errors import BatchError

Fingerprint = Callable[[Mapping[str, Any]], bytes]  # of a batch; empty: messages carry no marks


def fingerprint_samples(batch: Mapping[str, Any]) -> bytes:
    """Of every number in a batch of CPU tensors, and of the names of rows that are not read: 16 bytes."""
    found = hashlib.blake2b(digest_size=16)
    for key in sorted(batch):
        if hasattr(batch[key], "identity"):  # in files, and not read
            found.update(f"{key} ".encode() + batch[key].identity())
            continue
        values = batch[key].contiguous()
        array = (values.float() if values.is_floating_point() else values).numpy()  # numpy knows no bf16
        found.update(f"{key} {array.dtype} {array.shape} ".encode())
        found.update(array.tobytes())
    return found.digest()


def no_fingerprint(batch: Mapping[str, Any]) -> bytes:
    """Nothing: messages carry no marks."""
    return b""


def mark(contents: Iterable[bytes], where: tuple[object, ...], *numbers: np.ndarray) -> int:
    """A signed 64-bit number for these rows (`numbers`) of these samples (`contents`) at one border (`where`)."""
    found = hashlib.blake2b(repr(where).encode(), digest_size=8)
    for content in contents:
        found.update(content)
    for array in numbers:
        found.update(np.ascontiguousarray(array, dtype=np.int64))
    return int.from_bytes(found.digest(), "big", signed=True)


def require_same(found: int, expected: int, sender: int, receiver: int) -> None:
    """BatchError unless the mark that a message brought is the receiver's own."""
    if found != expected:
        raise BatchError(
            f"a message from rank {sender} to rank {receiver}",
            got=f"fingerprint {found:016x}",
            expected=f"{expected:016x}: the same samples, items and rows on both ranks",
            fix="let every rank read the same samples in the same order: same files, same seed, same number of workers",
        )
