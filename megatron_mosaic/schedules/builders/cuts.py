"""When units of the other modules run, on the clock of the backbone alone: moments at which all ranks do them.

    forward of a generator    its last microbatch has left the last stage; backward: at once, if nothing else is behind
    backward of an encoder    the last gradient of its unit has left stage 0, and every other consumer's
    forward of an encoder     one unit before it is wanted, and not before another one has made room

A module that feeds generators alone runs with them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from megatron_mosaic.schedules.actions import Action, Kind
from megatron_mosaic.schedules.builders.backbone import BackboneClock
from megatron_mosaic.schedules.stage_graph import StageGraph

Cuts = dict[str, list[int]]  # module -> time of each unit
Piece = tuple[tuple[int, ...], Action]  # an action, and the key that gives its place among others
BEFORE_ALL = -1


class EncoderCuts(NamedTuple):
    """Of forwards; and of modules that hold units, how many those must be at least."""

    forwards: Cuts
    least: dict[str, int]


def generator_forwards(graph: StageGraph, clock: BackboneClock) -> Cuts:
    """Of all modules whose work does not reach the backbone."""
    others = [m for m in graph.num_stages if m != graph.backbone and not graph.reaches(m, graph.backbone)]
    cuts: Cuts = {}
    for module in [m for m in others if graph.reaches(graph.backbone, m)]:
        sources = [source for source, target in graph.edges if target == module and source in cuts]
        own = [clock.left_last_stage(graph.microbatches_of(module, u)[-1]) for u in range(graph.num_units(module))]
        made = [max(_times(graph, module, u, sources, cuts), default=BEFORE_ALL) for u in range(len(own))]
        cuts[module] = [max(pair) for pair in zip(own, made)]
    for module in [m for m in reversed(others) if m not in cuts]:
        cuts[module] = [_wanted(graph, clock, module, unit, cuts) for unit in range(graph.num_units(module))]
    return cuts


def backwards(graph: StageGraph, clock: BackboneClock, forwards: Cuts) -> Cuts:
    """Of all modules that run backward, the backbone left out."""
    cuts: Cuts = {}
    for module in reversed([m for m in graph.num_stages if m in graph.has_backward and m != graph.backbone]):
        cuts[module] = []
        for unit in range(graph.num_units(module)):
            times = _times(graph, module, unit, graph.consumers(module), cuts)
            if graph.backbone in graph.consumers(module):
                times += [clock.left_first_stage(m) for m in graph.microbatches_of(module, unit)]
            if module in forwards:
                times.append(forwards[module][unit])
            cuts[module].append(max(times))
    return cuts


def encoder_forwards(
    graph: StageGraph,
    clock: BackboneClock,
    others: Cuts,
    returned: Cuts,
    hold: Callable[[int], int],
) -> EncoderCuts:
    """Of the modules whose work reaches the backbone. `hold(least)`: how many units a module may hold that must hold so
    many; more than it has are all.

    The first unit runs before all; the next ones are a unit ahead; from then on as soon as one has made room. What only
    feeds other encoders runs right before them.
    """
    cuts = dict(others)
    encoders = [m for m in graph.num_stages if graph.reaches(m, graph.backbone)]
    least: dict[str, int] = {}
    for module in reversed(encoders):
        wanted = [_wanted(graph, clock, module, unit, cuts) for unit in range(graph.num_units(module))]
        ahead = [min(pair) for pair in zip([BEFORE_ALL, *wanted[:-1]], wanted)]
        if graph.backbone not in graph.consumers(module):
            cuts[module] = wanted
        elif module not in returned:  # frozen: nothing is held
            cuts[module] = ahead
        else:
            least[module] = least_held(wanted, returned[module])
            held = min(hold(least[module]), len(wanted))
            cuts[module] = [returned[module][u - held] if u >= held else ahead[u] for u in range(len(wanted))]
    return EncoderCuts({module: cuts[module] for module in encoders}, least)


def least_held(wanted: Sequence[int], returned: Sequence[int]) -> int:
    """The smallest number of units with which none is wanted before the one that makes room for it has come back."""
    num_units = len(wanted)
    fits = (w for w in range(1, num_units) if all(returned[u - w] <= wanted[u] for u in range(w, num_units)))
    return next(fits, num_units)


def lay_in_order(graph: StageGraph, clock: BackboneClock, forwards: Cuts, returned: Cuts) -> tuple[Action, ...]:
    """One order: the backbone's by its clock, and before what begins at a cut, its work: generators forward and back,
    then backwards of encoders, which make room, then their forwards."""
    keyed: list[Piece] = [((clock.start[action], 4, place), action) for place, action in enumerate(clock.actions)]
    keyed += list_pieces(graph, forwards, returned)
    return tuple(action for _, action in sorted(keyed, key=lambda pair: pair[0]))


def list_pieces(graph: StageGraph, forwards: Cuts, returned: Cuts) -> list[Piece]:
    """The actions of all modules but the backbone, with keys that sort them; a key begins with the time of the cut."""
    keyed: list[Piece] = []
    for number, module in enumerate(graph.num_stages):  # sources stand before what they feed
        if module == graph.backbone:
            continue
        forward, backward = (3, 2) if graph.reaches(module, graph.backbone) else (0, 1)
        for unit, at in enumerate(forwards[module]):
            keyed += _through(graph, module, Kind.F, unit, (at, forward, number))
        for unit, at in enumerate(returned.get(module, ())):
            keyed += _through(graph, module, Kind.B, unit, (at, backward, -number))
    return keyed


def _through(graph: StageGraph, module: str, kind: Kind, unit: int, key: tuple[int, ...]) -> list[Piece]:
    """One unit through all virtual stages of a module."""
    ways = [(stage, chunk) for chunk in range(graph.chunks(module)) for stage in range(graph.num_stages[module])]
    if kind is not Kind.F:
        ways.reverse()
    return [((*key, unit, i), Action(module, stage, kind, unit, chunk)) for i, (stage, chunk) in enumerate(ways)]


def _times(
    graph: StageGraph, module: str, unit: int, neighbours: Sequence[str], cuts: Mapping[str, list[int]]
) -> list[int]:
    """Cuts of all units of neighbours that share a microbatch with this one."""
    covered = graph.microbatches_of(module, unit)
    return [cuts[other][u] for other in neighbours if other in cuts for u in graph.units_covering(other, covered)]


def _wanted(graph: StageGraph, clock: BackboneClock, module: str, unit: int, cuts: Cuts) -> int:
    """When the first consumer of a unit runs."""
    times = _times(graph, module, unit, graph.consumers(module), cuts)
    if graph.backbone in graph.consumers(module) or not times:
        times.append(clock.enters_first_stage(graph.microbatches_of(module, unit)[0]))
    return min(times)
