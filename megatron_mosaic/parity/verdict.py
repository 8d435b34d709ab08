"""What a check found, and when it is a pass."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from megatron_mosaic.plan.training import Format

FORMAT = Format.fp32  # whatever the plan trains in: rounding has to stay far below mistakes
TOLERANCE = 1e-5  # relative
# Where a gradient is a sum of terms that nearly cancel, fp32 itself leaves more than TOLERANCE open: the gradient of a
# top-1 router that saw one image may be 1e-5 of what was summed. Then it has to agree within so many times what it
# moves when the last bit of every weight does (ReferenceStep.rounding), and in any case within MOST_EXCUSED.
_ROUNDINGS = 20
MOST_EXCUSED = 1e-3  # relative


@dataclass(frozen=True, slots=True, kw_only=True)
class Parity:
    """Outcome of a check. Errors are relative; a gradient's is |ours - reference| / |reference|, in the 2-norm.

    `ill_conditioned`: errors of gradients that fp32 does not determine to TOLERANCE, and that are the same but for
    rounding. The other figures leave them out. `wholly_excused_modules`: nothing else was left of these in some step.
    `unexercised_modules`: trained, but no sample gave them any gradient, so nothing is known of them.
    `unrepeatable`: how far the reference is from itself in a second run, where it is; then nothing is excused.
    Parameters are those after the last step, of every replica; their errors are relative to the whole parameter.
    """

    steps: int
    loss_rel_err: float
    grad_rel_err_by_module: dict[str, float]
    worst_parameter: str
    ill_conditioned: dict[str, float]  # by "module/parameter in step N"
    wholly_excused_modules: tuple[str, ...]
    unexercised_modules: tuple[str, ...]
    unrepeatable: dict[str, float]  # by "module/parameter in step N"
    parameter_rel_err_by_module: dict[str, float]
    worst_replica: str  # "module/parameter on rank R"
    peak_activation_bytes_by_module: dict[str, int]
    empty_units_by_module: dict[str, int]
    imbalance_by_owner: dict[str, float]  # busiest lane over mean, were items computed where their sample is
    imbalance_by_module: dict[str, float]  # and as they are

    @property
    def grad_rel_err_max(self) -> float:
        return max(self.grad_rel_err_by_module.values())

    @property
    def parameter_rel_err_max(self) -> float:
        return max(self.parameter_rel_err_by_module.values())

    @property
    def is_same(self) -> bool:
        """Whether all that was compared agrees."""
        return max(self.loss_rel_err, self.grad_rel_err_max, self.parameter_rel_err_max) <= TOLERANCE

    @property
    def ok(self) -> bool:
        """Whether all agrees, and enough was compared to say so."""
        return self.is_same and not self.unexercised_modules and not self.wholly_excused_modules

    @property
    def sentences(self) -> list[str]:
        """What a user should know beside the figures."""
        found = [
            f"left out, because fp32 leaves as much open and it differs by rounding only: {name} ({error:.1e})"
            for name, error in self.ill_conditioned.items()
        ]
        for module in self.wholly_excused_modules:
            found.append(f"not ok: of {module}, nothing was left to compare in some step: give more samples")
        for module in self.unexercised_modules:
            found.append(
                f"not ok: {module} is trained, but no sample gave it a gradient: take more --steps or a larger "
                "global_batch_size, or freeze it"
            )
        if self.unrepeatable:
            name, error = max(self.unrepeatable.items(), key=lambda pair: pair[1])
            found.append(
                f"nothing is excused as rounding: the reference itself does not repeat, e.g. {name} differs by "
                f"{error:.1e} in a second run; something in it draws random numbers"
            )
        if max(self.loss_rel_err, self.grad_rel_err_max) > TOLERANCE:
            found.append(f"worst gradient: {self.worst_parameter}")
        if self.parameter_rel_err_max > TOLERANCE:
            found.append(f"worst parameter after the last step: {self.worst_replica}")
        return found

    def as_dict(self) -> dict[str, object]:
        """Keys of `mosaic check --json`."""
        return {
            "ok": self.ok,
            "format": FORMAT.value,
            "loss_rel_err": self.loss_rel_err,
            "grad_rel_err_max": self.grad_rel_err_max,
            "grad_rel_err_by_module": self.grad_rel_err_by_module,
            "worst_parameter": self.worst_parameter,
            "ill_conditioned": self.ill_conditioned,
            "wholly_excused_modules": list(self.wholly_excused_modules),
            "unexercised_modules": list(self.unexercised_modules),
            "unrepeatable": self.unrepeatable,
            "parameter_rel_err_max": self.parameter_rel_err_max,
            "parameter_rel_err_by_module": self.parameter_rel_err_by_module,
            "worst_replica": self.worst_replica,
            "peak_activation_bytes_by_module": self.peak_activation_bytes_by_module,
            "empty_units_by_module": self.empty_units_by_module,
            "imbalance_by_owner": self.imbalance_by_owner,
            "imbalance_by_module": self.imbalance_by_module,
            "steps": self.steps,
            "tolerance": TOLERANCE,
        }


def gradient_error(ours: np.ndarray, expected: np.ndarray, rounding: float) -> tuple[float, bool]:
    """(relative error in the 2-norm, whether it is above TOLERANCE and yet only rounding); inf for NaN."""
    error, size = norm(ours - expected), norm(expected)
    relative = ratio(error, size)
    is_rounding = TOLERANCE < relative <= MOST_EXCUSED and math.isfinite(rounding) and error <= _ROUNDINGS * rounding
    return relative, is_rounding


def norm(array: np.ndarray) -> float:
    """The 2-norm, summed in fp64."""
    return float(np.linalg.norm(array.astype(np.float64)))


def ratio(error: float, size: float) -> float:
    """error / size. NaN is infinity: `max` would otherwise lose it. 0 / 0 is no error."""
    found = error / size if size else (math.inf if error else 0.0)
    return found if math.isfinite(found) else math.inf
