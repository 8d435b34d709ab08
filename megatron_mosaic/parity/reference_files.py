"""What the reference leaves behind: a file per step, and its parameters after the last one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

_PARAMETERS = "reference-parameters.npz"


@dataclass(frozen=True, slots=True, kw_only=True)
class ReferenceStep:
    """Losses (mean over their own tokens) and gradients (`module/parameter`) of one optimizer step.

    `rounding`, if measured: how far each gradient moves, in the 2-norm, when the last bit of every weight does. That is
    how well fp32 determines it: another order of the same sums may change it by as much.
    `unrepeatable`: relative difference from an earlier run of the same step, where there is any. Then no rounding is
    measured: it would be that of chance.
    """

    losses: dict[str, float]
    gradients: dict[str, np.ndarray]
    rounding: dict[str, float]
    unrepeatable: dict[str, float]

    def save(self, directory: Path, step: int) -> None:
        """Write `reference-STEP.npz`: a key `FIELD/NAME` or `FIELD/MODULE/PARAMETER` for each number or array."""
        arrays = {
            f"{f.name}/{key}": np.asarray(value) for f in fields(self) for key, value in getattr(self, f.name).items()
        }
        np.savez(_path(directory, step), **arrays)  # type: ignore[arg-type]

    @classmethod
    def load(cls, directory: Path, step: int) -> ReferenceStep:
        """What `save` wrote."""
        found: dict[str, dict[str, Any]] = {f.name: {} for f in fields(cls)}
        with np.load(_path(directory, step), allow_pickle=False) as arrays:
            for key, array in arrays.items():
                field, _, name = key.partition("/")
                found[field][name] = array if field == "gradients" else float(array)
        return cls(**found)


def save_parameters(directory: Path, parameters: Mapping[str, np.ndarray]) -> None:
    """Write the values of all parameters, `module/parameter`, trained or not."""
    np.savez(directory / _PARAMETERS, **parameters)  # type: ignore[arg-type]


def load_parameters(directory: Path) -> dict[str, np.ndarray]:
    """What `save_parameters` wrote."""
    with np.load(directory / _PARAMETERS, allow_pickle=False) as arrays:
        return dict(arrays.items())


def _path(directory: Path, step: int) -> Path:
    return directory / f"reference-{step:04d}.npz"
