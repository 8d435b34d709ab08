"""Reads what the ranks dumped: gradients put together, parameters piece by piece."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from megatron_mosaic.runtime.dumps.place import Numbers, Place
from megatron_mosaic.runtime.parameters import put_together


def read_gradients(directory: str | Path, step: int) -> dict[str, Numbers]:
    """`module/parameter` -> whole gradient of one step. NaN where no rank dumped a number."""
    slices: dict[str, dict[int, Numbers]] = {}
    places: dict[str, Place] = {}
    for _, place, array in _read(directory, f"step-{step:04d}"):
        number = place.cut.rank if place.cut else 0
        own = slices.setdefault(place.name, {})
        if number not in own:
            own[number] = np.full(place.shape, np.nan, dtype=np.float32)
        own[number].reshape(-1)[place.start : place.start + len(array)] = array
        places[place.name] = place
    return {name: _whole(places[name], parts) for name, parts in slices.items()}


def read_parameters(directory: str | Path) -> Iterator[tuple[int, Place, Numbers]]:
    """(rank, place, flat values) of every rank's parameters after its last step."""
    return _read(directory, "parameters")


def _whole(place: Place, parts: dict[int, Numbers]) -> Numbers:
    if place.cut is None:
        return parts[0]
    nothing = np.full(place.shape, np.nan, dtype=np.float32)
    return put_together([parts.get(i, nothing) for i in range(place.cut.size)], place.cut.dim, place.cut.pieces)


def _read(directory: str | Path, what: str) -> Iterator[tuple[int, Place, Numbers]]:
    for path in sorted(Path(directory).glob(f"{what}-rank-*.npz")):
        with np.load(path, allow_pickle=False) as arrays:
            for key, array in arrays.items():
                yield int(path.stem.rpartition("-")[2]), Place.parse(key), array
