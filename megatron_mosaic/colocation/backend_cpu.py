"""Quotas on a CPU: a track is a thread with cores of its own, and its share of them is its number of intra-op threads.

cores of the host --LOCAL_RANK of LOCAL_WORLD_SIZE--> of the rank --shares--> of its tracks
"""

from __future__ import annotations

import contextlib
import os
import threading
import warnings
from collections.abc import Callable, Mapping
from functools import partial

import torch

from megatron_mosaic.colocation import threads
from megatron_mosaic.colocation.lane import Caps, LaneInfo, Lanes, host_clock
from megatron_mosaic.colocation.program import RankProgram
from megatron_mosaic.colocation.threads import TrackRun, Worker
from megatron_mosaic.flight.process import watch_threads
from megatron_mosaic.plan.quota import grant_cores, grant_quota
from megatron_mosaic.schedules import Action

Around = Callable[[bool], contextlib.AbstractContextManager[None]]


def cores_of_rank() -> tuple[int, ...]:
    """The cores a rank may call its own: its part of the host's (torchrun's LOCAL_RANK of LOCAL_WORLD_SIZE)."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    each = max(1, len(cores) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    first = int(os.environ.get("LOCAL_RANK", "0")) * each % len(cores)
    return tuple(cores[first : first + each])


def threads_in_turn(shares: Mapping[str, float]) -> dict[str, int]:
    """Module -> intra-op threads of modules that take turns."""
    cores = len(cores_of_rank())
    return {module: grant_quota(share, cores, 1) for module, share in shares.items()}


class CpuQuota:
    """Grants each module its intra-op threads when its turn comes in a thread. Does nothing where CUDA exists."""

    def __init__(self, threads: Mapping[str, int]) -> None:
        """`threads`: of each module."""
        self.threads = dict(threads)
        self._active = not torch.cuda.is_available()
        self._granted = _Granted()

    def grant(self, module: str) -> None:
        """The module's code runs next in this thread."""
        if self._active:
            self._granted.set(self.threads[module])


class _Granted(threading.local):
    """How many intra-op threads this thread has: `_count`, 0 before any were set. Setting them takes its time."""

    def __init__(self) -> None:
        self._count = 0

    def set(self, count: int) -> None:
        if count != self._count:
            torch.set_num_threads(count)
            self._count = count


class ThreadLanes:
    """A thread for every track, which lives as long as the lanes."""

    clock = staticmethod(host_clock)
    in_threads = True

    def __init__(self, infos: Mapping[int, LaneInfo], cores: Mapping[int, tuple[int, ...]], around: Around) -> None:
        """`cores`: of each track, where they are its own. `around(grad_enabled)`: around a thread's part of a step."""
        self.infos, self._around = infos, around
        self._workers = {
            track: Worker(f"mosaic-track-{track}", partial(_take_cores, cores.get(track, ()), info.granted))
            for track, info in infos.items()
        }
        watch_threads([worker.ident for worker in self._workers.values()], threads.__file__)

    def run(self, program: RankProgram, perform: Callable[[Action], None]) -> None:
        run, around = TrackRun(program, perform), partial(self._around, torch.is_grad_enabled())
        for track, actions in program.tracks.items():
            self._workers[track].submit(partial(run.follow, actions, around))
        run.join()

    def building(self, track: int) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def begin_step(self) -> None:
        pass

    def close(self) -> None:
        watch_threads([], threads.__file__)
        for worker in self._workers.values():
            worker.close()


class CpuBackend:
    """A thread a track, on cores of its own where the rank has as many as tracks."""

    name = "cpu"
    caps = Caps(beside=True, enforced=True, disjoint=True)

    def __init__(self, around: Around = lambda grad_enabled: torch.set_grad_enabled(grad_enabled)) -> None:
        """`around`: what a lane's thread needs beside its cores."""
        self._around = around

    def why_not(self) -> str:
        return "training runs on a GPU" if torch.cuda.is_available() else ""

    def quantise(self, shares: Mapping[int, float]) -> dict[int, LaneInfo]:
        """Cores; one each, which are not its own, where the rank has fewer cores than tracks."""
        cores = len(cores_of_rank())
        granted = grant_cores(shares, cores) if len(shares) <= cores else dict.fromkeys(shares, 1)
        return {
            track: LaneInfo(track=track, share=share, granted=granted[track], total=cores, unit="cores")
            for track, share in shares.items()
        }

    def open(self, shares: Mapping[int, float]) -> Lanes:
        infos, cores = self.quantise(shares), cores_of_rank()
        if len(infos) > len(cores):
            warnings.warn(
                f"{len(infos)} tracks on {len(cores)} core(s) a rank: each gets one thread, shares are not enforced",
                stacklevel=2,
            )
            return ThreadLanes(infos, {}, self._around)
        own, first = {}, 0
        for track, info in infos.items():
            own[track] = cores[first : first + info.granted]
            first += info.granted
        return ThreadLanes(infos, own, self._around)


def _take_cores(cores: tuple[int, ...], count: int) -> None:
    """This thread, and the intra-op threads that it starts, run on these cores (on any if there are none)."""
    if cores and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cores)
    torch.set_num_threads(count)
