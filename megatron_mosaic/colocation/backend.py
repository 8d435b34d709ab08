"""The table of quota backends, and which of them this machine has.

green_context  SMs of its own for every track, enforced by the driver     NVIDIA, CUDA 12.8 to 13.x
streams        tracks at the same time, nothing enforced                  any CUDA device
cpu            a thread with cores of its own for every track             the embedded default
none           tracks take turns                                          everywhere; the reference
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from megatron_mosaic.colocation.backend_cpu import Around, CpuBackend, threads_in_turn
from megatron_mosaic.colocation.backend_green_context import GreenContextBackend
from megatron_mosaic.colocation.backend_none import NoBackend, TurnLanes
from megatron_mosaic.colocation.backend_streams import StreamsBackend
from megatron_mosaic.colocation.lane import Lanes, QuotaBackend
from megatron_mosaic.errors import QuotaError
from megatron_mosaic.plan.quota import shares_of_tracks

AUTO = "auto"
BACKENDS: Mapping[str, Callable[[Around], QuotaBackend]] = {
    "green_context": lambda around: GreenContextBackend(),
    "streams": lambda around: StreamsBackend(),
    "cpu": CpuBackend,
    "none": lambda around: NoBackend(),
}
NAMES = (AUTO, *BACKENDS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """A backend, and why those before it in the table were not taken."""

    backend: QuotaBackend
    passed: Mapping[str, str]


def choose_backend(name: str, around: Around) -> Choice:
    """The backend of that name, or the first that works here. QuotaError if it does not.

    `around(grad_enabled)`: around what a lane's own thread does in a step.
    """
    if name not in NAMES:
        raise QuotaError("quota backend", got=name, expected=f"one of {', '.join(NAMES)}", fix="correct the name")
    passed: dict[str, str] = {}
    for candidate in BACKENDS if name == AUTO else (name,):
        backend = BACKENDS[candidate](around)
        passed[candidate] = backend.why_not()
        if not passed[candidate]:
            del passed[candidate]
            return Choice(backend=backend, passed=passed)
    raise QuotaError(
        "quota backend", got=name, expected=f"one that works here: {passed[name]}", fix="take auto, or another of them"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """A rank's open lanes, intra-op threads of its modules where it computes on a CPU, and what to tell the user."""

    lanes: Lanes
    threads: Mapping[str, int]
    notes: tuple[str, ...]


def open_lanes(name: str, tracks: Mapping[int, tuple[str, ...]], shares: Mapping[str, float], around: Around) -> Opened:
    """What a rank's tracks run on. `tracks`: track -> modules on it; `shares`: of each module. A rank with one track
    needs no backend. QuotaError if the shares cannot be granted."""
    if len(tracks) < 2:
        return Opened(lanes=TurnLanes({}), threads=threads_in_turn(shares), notes=())
    of_tracks = shares_of_tracks({track: [shares[m] for m in modules] for track, modules in tracks.items()})
    choice = choose_backend(name, around)
    cpu = CpuBackend(around)
    granted = {} if cpu.why_not() else cpu.quantise(of_tracks)  # as many whether they take turns or not: the same sums
    threads = {module: info.granted for track, info in granted.items() for module in tracks[track]}
    lanes = choice.backend.open(of_tracks)
    infos = lanes.infos.values()
    words = ", ".join(f"track {i.track} ({'+'.join(tracks[i.track])}) {i.granted} of {i.total} {i.unit}" for i in infos)
    notes = (f"quota backend {choice.backend.name}: {words}",)
    return Opened(
        lanes=lanes, threads=threads, notes=notes + tuple(f"not {key}: {why}" for key, why in choice.passed.items())
    )
