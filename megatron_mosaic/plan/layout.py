"""Where and how one module runs: degrees of its parallel axes, its ranks, what it recomputes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, fields
from enum import StrEnum
from functools import cached_property
from itertools import pairwise

from megatron_mosaic.errors import PlanError
from megatron_mosaic.plan.quota import Quota
from megatron_mosaic.plan.yaml_text import MAX_COUNT

# The axes along which a module's ranks are laid out, fastest first: as its dense layers see them, and as experts do.
AXES = ("tp", "cp", "dp", "pp")
EXPERT_AXES = ("etp", "ep", "expt_dp", "pp")
type Four = tuple[int, int, int, int]  # one number for each of these axes

_SPAN = re.compile(r"([0-9]+)(?:-([0-9]+))?")
_MAX_RANK_DIGITS = len(str(MAX_COUNT))


class Recompute(StrEnum):
    """Which activations the backward pass computes again."""

    none = "none"
    selective = "selective"  # those inside attention
    full = "full"  # those inside layers
    whole = "whole"  # all: the forward keeps its inputs and what it exports, and the backward runs it again


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Degrees of one module's parallel axes. Ranks are laid out tp fastest, then cp, dp, pp slowest."""

    tp: int = 1
    cp: int = 1
    pp: int = 1
    vpp: int = 1
    dp: int = 1
    ep: int = 1
    etp: int = 1

    def __post_init__(self) -> None:
        for axis in fields(self):
            if getattr(self, axis.name) < 1:
                raise PlanError(
                    f"layout.{axis.name}", got=getattr(self, axis.name), expected="at least 1", fix=f"set {axis.name}"
                )
        if self.num_ranks // self.pp % (self.ep * self.etp):
            raise PlanError(
                "layout.ep",
                got=f"ep {self.ep} x etp {self.etp}",
                expected=f"a divisor of the {self.num_ranks // self.pp} ranks of a pipeline stage",
                fix="change ep or etp",
            )

    @property
    def num_ranks(self) -> int:
        return self.tp * self.cp * self.pp * self.dp

    @property
    def degrees(self) -> Four:
        """Of AXES."""
        return self.tp, self.cp, self.dp, self.pp

    @property
    def expert_degrees(self) -> Four:
        """Of EXPERT_AXES: the same ranks, a stage's seen as expert-tp, ep, and expert-dp for the rest."""
        return self.etp, self.ep, self.num_ranks // (self.pp * self.ep * self.etp), self.pp

    def __str__(self) -> str:
        degrees = [f"{a.name}{getattr(self, a.name)}" for a in fields(self) if getattr(self, a.name) != 1]
        return " ".join(degrees) or "single"


@dataclass(frozen=True)
class RankSet:
    """Global ranks, ascending and unique, kept as spans: 100,000 consecutive ranks are one. Written `0-3,8-11`."""

    spans: tuple[tuple[int, int], ...]  # (first, last + 1), ascending, with a gap between two

    def __post_init__(self) -> None:
        ends = [end for span in self.spans for end in span]
        if not ends or ends[0] < 0 or any(before >= after for before, after in pairwise(ends)):
            raise PlanError(
                "ranks",
                got=self.spans,
                expected="one or more spans, ascending, with a gap between two",
                fix="sort them",
            )

    @classmethod
    def parse(cls, text: str) -> RankSet:
        """`"0-3,8"` -> ranks 0, 1, 2, 3, 8. Strict: ascending spans that do not overlap."""
        spans: list[tuple[int, int]] = []
        for part in text.split(","):
            match = _SPAN.fullmatch(part.strip())
            if match is None:
                raise PlanError("ranks", got=repr(text[:200]), expected="spans like 0-3,8-11", fix="rewrite the span")
            if max(map(len, part.split("-"))) > _MAX_RANK_DIGITS or int(match[2] or match[1]) >= MAX_COUNT:
                raise PlanError("ranks", got=part[:40], expected=f"ranks below {MAX_COUNT}", fix="correct the span")
            first = int(match[1])
            last = int(match[2]) if match[2] else first
            if last < first or (spans and first < spans[-1][1]):
                raise PlanError(
                    "ranks", got=repr(text), expected="ascending spans that do not overlap", fix="sort the spans"
                )
            spans.append((first, last + 1))
        return cls.joined(spans)

    @classmethod
    def of(cls, ranks: Iterable[int]) -> RankSet:
        return cls.joined((rank, rank + 1) for rank in sorted(set(ranks)))

    @classmethod
    def joined(cls, spans: Iterable[tuple[int, int]]) -> RankSet:
        """Of ascending spans, some of which may touch."""
        joined: list[tuple[int, int]] = []
        for first, stop in spans:
            if joined and joined[-1][1] == first:
                joined[-1] = (joined[-1][0], stop)
            else:
                joined.append((first, stop))
        return cls(tuple(joined))

    @classmethod
    def block(cls, first: int, size: int) -> RankSet:
        """`size` consecutive ranks."""
        return cls(((first, first + size),))

    @cached_property
    def ranks(self) -> tuple[int, ...]:
        """One by one: where they are few, or each is to be named."""
        return tuple(rank for first, stop in self.spans for rank in range(first, stop))

    @property
    def first(self) -> int:
        return self.spans[0][0]

    @property
    def last(self) -> int:
        return self.spans[-1][1] - 1

    def part(self, start: int, stop: int) -> RankSet:
        """The ranks at positions start .. stop - 1."""
        spans, position = [], 0
        for first, end in self.spans:
            low, high = max(first, first + start - position), min(end, first + stop - position)
            if low < high:
                spans.append((low, high))
            position += end - first
        return RankSet(tuple(spans))

    def overlaps(self, other: RankSet) -> bool:
        """Whether a rank is in both."""
        return any(a < other_end and other_first < b for a, b in self.spans for other_first, other_end in other.spans)

    def __contains__(self, rank: int) -> bool:
        return any(first <= rank < stop for first, stop in self.spans)

    def __iter__(self) -> Iterator[int]:
        return iter(self.ranks)

    def __len__(self) -> int:
        return sum(stop - first for first, stop in self.spans)

    def __str__(self) -> str:
        return ",".join(f"{first}-{stop - 1}" if stop - first > 1 else f"{first}" for first, stop in self.spans)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModulePlan:
    """Where and how one module runs. `unit` 0: the schedule decides how many microbatches an action covers."""

    ranks: RankSet
    layout: Layout
    quota: Quota = field(default_factory=Quota)
    unit: int = 0
    recompute: Recompute = Recompute.none
    sequence_parallel: bool = False  # between its layers, tokens are split over the tp ranks (Korthikanti et al. 2022)

    def __post_init__(self) -> None:
        if self.sequence_parallel and self.layout.tp == 1:
            raise PlanError(
                "sequence_parallel", got="true with tp 1", expected="tp above 1: it splits over tp", fix="leave it out"
            )
        if len(self.ranks) != self.layout.num_ranks:
            raise PlanError(
                "ranks",
                got=f"{len(self.ranks)} ranks ({self.ranks})",
                expected=f"{self.layout.num_ranks} ranks for layout {self.layout} (tp x cp x pp x dp)",
                fix=f"change the layout, or list {self.layout.num_ranks} ranks",
            )
        if self.unit < 0:
            raise PlanError("unit", got=self.unit, expected="at least 1", fix="omit it to let the schedule decide")

    def stage_ranks(self, stage: int) -> RankSet:
        """The ranks of one pipeline stage (pp is the slowest axis)."""
        size = self.layout.num_ranks // self.layout.pp
        return self.ranks.part(stage * size, (stage + 1) * size)


@dataclass(frozen=True, slots=True)
class Coordinates:
    """Where one rank stands in a module's layout."""

    tp: int
    cp: int
    dp: int
    pp: int


def position_at(degrees: Four, place: Four) -> int:
    """Number of a place among all places of these degrees. The one formula of a layout; `place_at` is its inverse."""
    first, second, third, _ = degrees
    return place[0] + first * (place[1] + second * (place[2] + third * place[3]))


def place_at(degrees: Four, position: int) -> Four:
    """The place with this number."""
    rest, first = divmod(position, degrees[0])
    rest, second = divmod(rest, degrees[1])
    fourth, third = divmod(rest, degrees[2])
    return first, second, third, fourth


def coordinates_of(module: ModulePlan, rank: int) -> Coordinates:
    """The rank's place in the module's layout. ValueError if the rank is not in it."""
    return Coordinates(*place_at(module.layout.degrees, module.ranks.ranks.index(rank)))


def rank_at(module: ModulePlan, *, tp: int = 0, cp: int = 0, dp: int = 0, pp: int = 0) -> int:
    """The global rank at these coordinates."""
    return module.ranks.ranks[position_at(module.layout.degrees, (tp, cp, dp, pp))]
