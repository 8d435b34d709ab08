"""Which item goes to which lane of which module. Pure integers, computed alike on every rank from counts alone.

global microbatch: samples 0 1 | 2 3        backbone lanes own samples in blocks of micro_batch_size
images             0   1 2 |   3            other modules share out their items evenly, whoever owns the sample
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_mosaic.plan import Plan


@dataclass(frozen=True, slots=True)
class Assignment:
    """Item numbers per module and lane. `owned[m][d]` are the items of module m whose samples backbone lane d owns."""

    lanes: Mapping[str, tuple[tuple[int, ...], ...]]
    owned: Mapping[str, tuple[tuple[int, ...], ...]]

    def held_by(self, holder: str, items_of: str, backbone: str) -> tuple[tuple[int, ...], ...]:
        """Per lane of `holder`: the items of module `items_of` it holds."""
        return self.owned[items_of] if holder == backbone else self.lanes[items_of]


def assign_items(plan: Plan, backbone: str, counts: Mapping[str, Sequence[int]]) -> Assignment:
    """Share out one global microbatch. `counts[m][s]`: how many items of module m sample s brings."""
    num_lanes = plan.modules[backbone].layout.dp
    num_samples = len(counts[backbone])
    assert num_samples == plan.micro_batch_size * num_lanes, (num_samples, plan.micro_batch_size, num_lanes)
    sample_blocks = split_evenly(num_samples, num_lanes)
    lanes: dict[str, tuple[tuple[int, ...], ...]] = {}
    owned: dict[str, tuple[tuple[int, ...], ...]] = {}
    for name, per_sample in counts.items():
        first = [0]
        for count in per_sample:
            first.append(first[-1] + count)
        owned[name] = tuple(tuple(range(first[block.start], first[block.stop])) for block in sample_blocks)
        if name == backbone:
            lanes[name] = tuple(tuple(block) for block in sample_blocks)
        else:
            lanes[name] = tuple(tuple(block) for block in split_evenly(first[-1], plan.modules[name].layout.dp))
    return Assignment(lanes, owned)


def split_evenly(num_items: int, num_lanes: int) -> tuple[range, ...]:
    """Contiguous blocks whose sizes differ by at most one."""
    edges = [lane * num_items // num_lanes for lane in range(num_lanes + 1)]
    return tuple(range(a, b) for a, b in itertools.pairwise(edges))
