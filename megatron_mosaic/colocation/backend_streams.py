"""Tracks on CUDA streams: one host thread launches all actions in the schedule's order, each on its track's stream.

    host     vision.0F0  llm.0F0  vision.0F1  llm.0B0 ...        launches return at once
    track 0               F0 ......... B0 .........              llm.0F0 waits for the event behind vision.0F0
    track 1  F0 ....  F1 ....

Nothing is enforced: kernels of two streams share SMs as the hardware likes. Backward runs on the stream of its forward
(autograd sees to that), and inside its lane, so that it does not wait for other lanes' leaves.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from megatron_mosaic.colocation.lane import Caps, LaneInfo, Lanes
from megatron_mosaic.colocation.program import RankProgram
from megatron_mosaic.schedules import Action

CONNECTIONS_VARIABLE = "CUDA_DEVICE_MAX_CONNECTIONS"


@dataclass(frozen=True, slots=True)
class EventMoment:
    """An event on a stream; `base` was recorded at `base_s` of the host's clock."""

    event: Any
    base: Any
    base_s: float

    def seconds(self) -> float:
        self.event.synchronize()
        return self.base_s + float(self.base.elapsed_time(self.event)) / 1e3


class EventClock:
    """Reads the time on the current stream. `_base` and `_base_s` are of the last `restart`."""

    def __init__(self) -> None:
        self._base, self._base_s = self._now()

    def restart(self) -> None:
        """Moments from here on are counted from now: floats of milliseconds lose their digits with the hours."""
        self._base, self._base_s = self._now()

    def __call__(self) -> EventMoment:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return EventMoment(event, self._base, self._base_s)

    def _now(self) -> tuple[Any, float]:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        event.synchronize()
        return event, time.monotonic()


class StreamLanes:
    """A stream for every track, and one of the whole device for what runs when all other tracks are done.

    That one takes the units whose forward comes after the last action of every other track: a quota binds a unit's
    forward and backward together, since backward runs on the stream of its forward.
    """

    in_threads = False

    def __init__(self, infos: Mapping[int, LaneInfo], streams: Mapping[int, Any], whole: Any) -> None:
        self.infos, self._streams, self._whole = infos, streams, whole
        self._clock = EventClock()

    @property
    def clock(self) -> EventClock:
        return self._clock

    def run(self, program: RankProgram, perform: Callable[[Action], None]) -> None:
        caller = torch.cuda.current_stream()
        lanes = (*self._streams.values(), self._whole)
        for stream in lanes:
            stream.wait_stream(caller)
        done: dict[Action, Any] = {}
        at = dict(self._streams)  # track -> the stream of its last action
        for action in program.actions:
            track = program.track_of[action]
            stream = self._whole if action in program.alone else self._streams[track]
            if stream is not at[track]:  # the order of a track holds across its streams; nobody runs beside the whole
                for other in at.values():
                    stream.wait_stream(other)
                at[track] = stream
            with torch.cuda.stream(stream):
                for need in program.waits.get(action, ()):
                    stream.wait_event(done[need])
                perform(action)
                if action in program.awaited:
                    done[action] = stream.record_event()
        for stream in lanes:
            caller.wait_stream(stream)

    @contextlib.contextmanager
    def building(self, track: int) -> Iterator[None]:
        """Nodes that accumulate gradients run on the stream on which they were made."""
        stream, caller = self._streams.get(track, self._whole), torch.cuda.current_stream()
        stream.wait_stream(caller)
        with torch.cuda.stream(stream):
            yield
        caller.wait_stream(stream)

    def begin_step(self) -> None:
        self._clock.restart()

    def close(self) -> None:
        torch.cuda.synchronize()


def why_no_cuda() -> str:
    """Why no lane can be on a GPU; "" if it can."""
    if not torch.cuda.is_available():
        return "no CUDA device"
    if os.environ.get(CONNECTIONS_VARIABLE) == "1":
        return (
            f"{CONNECTIONS_VARIABLE}=1: with one connection streams queue behind each other. Megatron demands it for "
            "tp or cp above 1 before Blackwell: give all modules tp 1 and cp 1 there, or let them take turns"
        )
    return ""


class StreamsBackend:
    """A stream a track, the backbone's with a higher priority. Shares are not enforced."""

    name = "streams"
    caps = Caps(beside=True, enforced=False, disjoint=False)

    def why_not(self) -> str:
        return why_no_cuda()

    def quantise(self, shares: Mapping[int, float]) -> dict[int, LaneInfo]:
        total = torch.cuda.get_device_properties(torch.cuda.current_device()).multi_processor_count
        return {
            track: LaneInfo(track=track, share=share, granted=total, total=total, unit="SMs, shared")
            for track, share in shares.items()
        }

    def open(self, shares: Mapping[int, float]) -> Lanes:
        streams = {track: torch.cuda.Stream(priority=0 if track else -1) for track in shares}
        return StreamLanes(self.quantise(shares), streams, torch.cuda.Stream())
