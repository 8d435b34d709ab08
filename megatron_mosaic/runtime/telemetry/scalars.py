"""The numbers of a report by the names under which TensorBoard and scalars.jsonl hold them; and the line that is said.

mosaic/busy_frac/vision  mosaic/bubble_frac/vision  mosaic/imbalance/vision  mosaic/boundary_bytes/vision
mosaic/predicted_over_measured/vision  mosaic/predicted_over_measured/step  mosaic/step_s  mosaic/mfu
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from megatron_mosaic.runtime.telemetry.numbers import LaneSeconds, Shared
from megatron_mosaic.runtime.telemetry.prediction import Prediction
from megatron_mosaic.units import format_seconds

_MOST_LANES = 8  # in the line


class Writer(Protocol):
    """Megatron's TensorBoard writer."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None: ...

    def flush(self) -> None: ...


def name_scalars(shared: Shared, predicted: Prediction | None) -> dict[str, float]:
    """Name -> value. What was predicted, and MFU, whose FLOPs it counts, are there only with a prediction."""
    step_s = shared.mean_step_s
    found = {"mosaic/step_s": step_s}
    for number, values in shared.by_module.items():
        found |= {f"mosaic/{number}/{module}": value for module, value in values.items()}
    if predicted is None:
        return found
    found["mosaic/mfu"] = predicted.mfu_frac(step_s)
    found["mosaic/predicted_over_measured/step"] = predicted.step_s / step_s
    for module, (expected_s, measured_s) in _by_module(shared.lanes, predicted).items():
        found[f"mosaic/predicted_over_measured/{module}"] = expected_s / measured_s
    return found


def write_scalars(writer: Writer, iteration: int, scalars: Mapping[str, float]) -> None:
    """All of them, at this iteration."""
    for name, value in scalars.items():
        writer.add_scalar(name, value, iteration)
    writer.flush()


def _by_module(lanes: Mapping[str, LaneSeconds], predicted: Prediction) -> dict[str, tuple[float, float]]:
    """Module -> seconds of its lanes, predicted and measured; modules that nobody predicted, or measured, are left
    out."""
    found: dict[str, tuple[float, float]] = {}
    for lane, seconds in lanes.items():
        if not lane.startswith("~") and lane in predicted.lane_s:
            module = lane.partition(".")[0]
            expected_s, measured_s = found.get(module, (0.0, 0.0))
            found[module] = expected_s + predicted.lane_s[lane], measured_s + seconds.mean_s
    return {module: pair for module, pair in found.items() if pair[1] > 0}


def describe(first: int, last: int, shared: Shared, predicted: Prediction | None) -> str:
    """One line: the step, then its lanes, those first whose worst rank is furthest above their mean."""
    lanes = {lane: found for lane, found in shared.lanes.items() if not lane.startswith("~")}
    ordered = sorted(lanes, key=lambda lane: lanes[lane].mean_s - lanes[lane].worst_s)
    words = [_describe_lane(lane, lanes[lane], predicted) for lane in ordered[:_MOST_LANES]]
    more = len(ordered) - len(words)
    words += [f"{more} more lanes"] if more else []
    step = f"step {format_seconds(shared.mean_step_s)}"
    if predicted is not None:
        step += f" (predicted {format_seconds(predicted.step_s)}, {predicted.step_s / shared.mean_step_s - 1:+.0%})"
    return f"> mosaic: steps {first}-{last}: {step}; {'; '.join(words)}"


def _describe_lane(lane: str, found: LaneSeconds, predicted: Prediction | None) -> str:
    expected_s = predicted.lane_s.get(lane) if predicted else None
    words = f"{lane} {format_seconds(found.mean_s)}"
    if expected_s is not None:
        words += f" (predicted {format_seconds(expected_s)})"
    ratio = found.worst_s / found.mean_s if found.mean_s else 1.0
    return f"{words}, worst rank {found.worst_rank} {format_seconds(found.worst_s)} ({ratio:.2f}x)"
