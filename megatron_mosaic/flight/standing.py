"""Where a thread of this process stands, read from its Python stack: nothing is written down while it runs.

A rank that waits for another stands inside torch.distributed, or at a `.wait(` of a message it has posted; the frames
there say for whom. One that stands anywhere else is busy, or hangs by itself.
"""

from __future__ import annotations

import linecache
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from megatron_mosaic.flight.line import WAIT

_CALLS = ("torch/distributed/distributed_c10d.py", "torch/distributed/rendezvous.py")
_LIBRARY = ("torch/", "/threading.py", "/contextlib.py")  # no place that a reader would look for
_MAX_PEERS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """`waits_in`: the communication call, or "" ; `peers`: global ranks that it waits for, if known."""

    waits_in: str
    peers: tuple[int, ...]
    place: str


def find_standing(thread: int, rank: int) -> Standing:
    """Where another thread is, on this rank."""
    frames = list(_outwards(sys._current_frames().get(thread)))
    if not frames or thread == threading.get_ident():
        return Standing(waits_in="", peers=(), place="")
    waits_in = _waiting_call(frames)
    peers = sorted(_peers(frames, waits_in) - {rank})[:_MAX_PEERS] if waits_in else []
    return Standing(waits_in=waits_in, peers=tuple(peers), place=_place(frames))


def _outwards(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def _waiting_call(frames: list[FrameType]) -> str:
    """The outermost function of torch.distributed that the stack ends in, or WAIT."""
    if _file(frames[0]).endswith(_CALLS):
        inside = "torch/distributed/"
        names = []
        for frame in frames:
            if inside not in _file(frame):
                break
            names.append(frame.f_code.co_name)
        call = next(name for name in reversed(names) if name != "wrapper")
        return "" if call == "_distributed_excepthook" else call
    line = linecache.getline(frames[0].f_code.co_filename, frames[0].f_lineno)
    return WAIT if ".wait(" in line and not _file(frames[0]).endswith("/threading.py") else ""


def _peers(frames: list[FrameType], waits_in: str) -> set[int]:
    """The ranks that the innermost frames name: the sender, the members of the group, or who sends the message."""
    distributed: Any = sys.modules.get("torch.distributed")
    for frame in frames[:6]:
        found = frame.f_locals
        if waits_in == "recv" and isinstance(found.get("src"), int):
            return {found["src"]}
        if waits_in == WAIT:
            sender = getattr(found.get("self"), "sender", None)  # Incoming.take
            return {sender} if isinstance(sender, int) else set()
        if "group" in found and distributed is not None and distributed.is_initialized():
            return set(distributed.get_process_group_ranks(found["group"]))
    return set()


def _place(frames: list[FrameType]) -> str:
    """The innermost function that is not the library's, with its file and line."""
    frame = next((f for f in frames if not any(part in _file(f) for part in _LIBRARY)), frames[0])
    return f"{frame.f_code.co_name} ({Path(_file(frame)).name}:{frame.f_lineno})"


def _file(frame: FrameType) -> str:
    return frame.f_code.co_filename.replace("\\", "/")
