"""Bytes of a rank over the step, by what holds them, against what it may fill: a curve for each class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from megatron_mosaic.cost_model.simulate import Simulation, count_memory

POINTS = 240  # of a curve: about one for three pixels
MAX_CURVES = 24  # those of the fullest ranks

Sample = tuple[float, Mapping[str, float]]


def describe_memory(simulation: Simulation, limit_bytes: float, device_bytes: float) -> dict[str, Any]:
    """Curves of the fullest classes, `holders` from the bottom of the stack to its top; `at` in seconds.

    `others`: how many classes hold less than every curve that is drawn.
    """
    samples, kinds = count_memory(simulation), simulation.price.work.replicas.kinds
    first = {kind.rank_class: kind.ranks.first for kind in reversed(kinds)}  # alike in time or not, they hold the same
    peaks, classes = simulation.class_peak_bytes, simulation.price.work.classes
    fullest = sorted(first, key=lambda number: (-peaks[number], number))
    curves = []
    for number in fullest[:MAX_CURVES]:
        kept = thin_out(samples[first[number]], simulation.step_s)
        holders = list(samples[first[number]][0][1])
        curves.append(
            {
                "ranks": str(classes[number].ranks),
                "peak": peaks[number],
                "holders": holders,
                "at": [at_s for at_s, _ in kept],
                "bytes": [[round(held[name]) for _, held in kept] for name in holders],
            }
        )
    return {
        "step_s": simulation.step_s,
        "limit": limit_bytes,
        "device": device_bytes,
        "curves": curves,
        "others": len(first) - len(curves),
    }


def thin_out(samples: Sequence[Sample], end_s: float, points: int = POINTS) -> list[Sample]:
    """At most two samples for each of `points` equal parts of the step: the one that holds most, and the last one.

    The highest sample of all is kept, so that the curve's top is the peak.
    """
    parts: dict[int, list[Sample]] = {}
    for sample in samples:
        part = min(points - 1, int(points * sample[0] / end_s))
        parts.setdefault(part, []).append(sample)
    kept: list[Sample] = []
    for inside in parts.values():
        highest = max(inside, key=lambda sample: sum(sample[1].values()))
        kept += [highest] if highest is inside[-1] else [highest, inside[-1]]
    return kept
