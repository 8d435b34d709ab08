"""Ranks for the parts of waves: inside islands, where their rows are, where memory is free.

Spindle, section 3.5: (a) a MetaOp and what flows to it stay in one island (a node); (b) the largest volumes choose
first; (c) devices with the parameters already, then those with most free memory. Where a rank overflows, the last waves
are placed again by memory alone, at most `_DEPTH` of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from enum import StrEnum

from megatron_mosaic.cost_model.effects.memory import stage_memory
from megatron_mosaic.cost_model.waves.activations import NONE, Activations, after_slice
from megatron_mosaic.cost_model.waves.slices import list_pools
from megatron_mosaic.cost_model.waves.step import WaveClock
from megatron_mosaic.cost_model.waves.transfers import list_feeds
from megatron_mosaic.plan import Layout, RankSet, Recompute
from megatron_mosaic.plan.tasks.waves import Slice, Waves
from megatron_mosaic.search.spindle.wavefront import Part, Wave

_DEPTH = 4


class Rule(StrEnum):
    """What decides on ranks."""

    islands = "islands"  # Spindle's: of nodes that are large enough, the fullest; of ranks, those with most memory
    packed = "packed"  # the same for what is somewhere already; what is new fills up ranks from 0
    in_turn = "in turn"  # the next free ones, from rank 0 in every wave
    memory = "memory"  # those with most free: where islands overflow


KEEPING = (Rule.islands, Rule.packed)  # rows where they are


@dataclass(frozen=True, slots=True, kw_only=True)
class _State:
    """Before a wave: what ranks hold, and where rows are."""

    static_bytes: Mapping[int, float] = field(default_factory=dict)  # of parameters and their states, by rank
    activations: Mapping[int, Activations] = field(default_factory=dict)
    holders: Mapping[tuple[str, int], frozenset[int]] = field(default_factory=dict)  # module, layer -> ranks
    last: Mapping[tuple[str, str], Slice] = field(default_factory=dict)  # task, module -> its last slice

    @property
    def peak_bytes(self) -> float:
        """Of the fullest rank in its fullest moment."""
        return max(held + self.activations[rank].fullest_bytes for rank, held in self.static_bytes.items())

    def held_bytes(self, rank: int) -> float:
        """What it would hold if nothing were at work."""
        return self.static_bytes.get(rank, 0.0) + self.activations.get(rank, NONE).held_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Placer:
    """Places the waves of one workload on one cluster. None where no rule makes them fit."""

    clock: WaveClock
    recompute: Recompute
    memory_bytes: float
    num_ranks: int
    gpus_per_node: int

    def place(self, waves: Sequence[Wave], rule: Rule) -> Waves | None:
        """Slices of all waves."""
        rules = [rule] * len(waves)
        states, placed = [_State()], list[tuple[Slice, ...]]()
        while len(placed) < len(waves):
            number = len(placed)
            wave = self._place_wave(waves[number], states[-1], rules[number])
            after = self._after(states[-1], wave)
            if after.peak_bytes <= self.memory_bytes:
                placed.append(wave)
                states.append(after)
                continue
            back = next((i for i in range(number, number - _DEPTH, -1) if i >= 0 and rules[i] in KEEPING), None)
            if back is None:
                return None
            rules[back] = Rule.memory
            del placed[back:], states[back + 1 :]
        return tuple(placed)

    def _place_wave(self, wave: Wave, state: _State, rule: Rule) -> tuple[Slice, ...]:
        """Rules of KEEPING let parts keep what they stand on before any of them grows. Where smaller groups that stay
        break up those that a larger tp needs, nothing is kept: then all find room."""
        chosen = self._choose(wave, state, rule, keeps=rule in KEEPING)
        if any(len(ranks) < part.count for part, ranks in chosen.items()):
            chosen = self._choose(wave, state, rule, keeps=False)
        return tuple(self.slice_of(part, RankSet.of(chosen[part])) for part in wave)

    def _choose(self, wave: Wave, state: _State, rule: Rule, *, keeps: bool) -> dict[Part, list[int]]:
        """Ranks of each part. Larger tp first, so that its groups are not broken up; then the largest volumes."""
        free = set(range(self.num_ranks))
        feeding = {part: self._feeding(part, state) for part in wave}
        volumes = {part: self._values(part) * bool(feeding[part]) * (rule is not Rule.in_turn) for part in wave}
        chosen: dict[Part, list[int]] = {part: [] for part in wave}
        order = sorted(wave, key=lambda each: (-each.op.tp, -volumes[each], each.op.module))
        for grows in (False, True) if keeps else (True,):
            for part in order:
                missing = (part.count - len(chosen[part])) // part.op.tp
                blocks = self._blocks(part, free if grows else free & feeding[part])
                best = self._sort(part, blocks, missing, feeding[part], state, rule)
                ranks = [block + i for block in best[:missing] for i in range(part.op.tp)]
                chosen[part] += ranks
                free -= set(ranks)
        return chosen

    def _blocks(self, part: Part, free: Set[int]) -> list[int]:
        """First ranks of its groups of tp that are free."""
        tp = part.op.tp
        return [first for first in range(0, self.num_ranks, tp) if all(first + i in free for i in range(tp))]

    def _values(self, part: Part) -> float:
        """That its hidden states have."""
        use = self.clock.uses[part.op.key]
        return use.items * use.module.tokens_per_item * use.module.hidden_size

    def slice_of(self, part: Part, ranks: RankSet) -> Slice:
        """The part on these ranks."""
        return Slice(
            task=part.op.task,
            module=part.op.module,
            first_layer=part.first_layer,
            num_layers=part.num_layers,
            ranks=ranks,
            layout=Layout(tp=part.op.tp, dp=part.count // part.op.tp),
            recompute=self.recompute,
        )

    def _sort(
        self, part: Part, blocks: list[int], needed: int, feeding: frozenset[int], state: _State, rule: Rule
    ) -> list[int]:
        """Groups of ranks, the best first."""
        if rule is Rule.in_turn:
            return blocks
        holding = state.holders.get((part.op.module, part.first_layer), frozenset[int]())
        near = Counter(rank // self.gpus_per_node for rank in feeding)  # island -> how much of its rows is there
        room = Counter(block // self.gpus_per_node for block in blocks)

        def worth(block: int) -> tuple[float, ...]:
            free_bytes = -max(map(state.held_bytes, range(block, block + part.op.tp)))
            island = block // self.gpus_per_node
            stays, held = block in feeding, block in holding
            if rule is Rule.memory:
                return free_bytes, stays, near[island], held, -block
            if rule is Rule.packed:
                return stays, near[island], held, -block
            # without rows that are anywhere: an island that is just large enough, so that others stay whole
            fits = room[island] >= needed
            return stays, near[island], held, fits, -room[island] if fits else room[island], free_bytes, -block

        return sorted(blocks, key=worth, reverse=True)

    def _feeding(self, part: Part, state: _State) -> frozenset[int]:
        """Ranks that have what it needs."""
        first = self.slice_of(part, RankSet.block(0, part.count))
        feeds = list_feeds(first, state.last, self.clock.uses, self.clock.workload)
        return frozenset(rank for feed in feeds for rank in feed.source.ranks)

    def _after(self, state: _State, wave: Sequence[Slice]) -> _State:
        static, activations = dict(state.static_bytes), dict(state.activations)
        holders, last = dict(state.holders), dict(state.last)
        for each in wave:
            cost, layer_bytes = self.clock.cost(each), self._layer_bytes(each)
            activations |= after_slice(each.ranks, cost, activations)
            for layer in range(each.first_layer, each.end_layer):
                key = each.module, layer
                before = holders.get(key, frozenset[int]())
                for rank in set(each.ranks) - before:
                    static[rank] = static.get(rank, 0.0) + layer_bytes
                holders[key] = before | set(each.ranks)
            last[each.task, each.module] = each
        return _State(static_bytes=static, activations=activations, holders=holders, last=last)

    def _layer_bytes(self, each: Slice) -> float:
        """What a layer's parameters need on a rank, with their optimizer split over those of this slice."""
        (pool,) = list_pools([each], self.clock.workload, self.gpus_per_node)
        source = self.clock.model.source
        return stage_memory(pool.work, source.precision, source.setup).static_bytes / each.num_layers
