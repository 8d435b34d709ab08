"""A CUDA driver and streams that keep the rules of the real ones, as far as quotas go, and record every call.

Rules (CUDA driver API, green contexts): a split makes at most as many groups as fit, each of `minCount` SMs rounded up
to the granularity, from the lowest SMs on, and leaves the remainder; two splits of one device describe the same SMs; a
descriptor takes one resource, or several of one split from 13.0 on; a context has the SMs of its descriptor; streams
are destroyed before their contexts. Written from the documentation: no real driver has been compared with it.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

SUCCESS = 0


@dataclass
class Resource:
    """SMs by number, and the split that they come from."""

    sms: tuple[int, ...]
    split: int
    granularity: int
    tells_granularity: bool

    @property
    def sm(self) -> SimpleNamespace:
        told = {"minSmPartitionSize": self.granularity, "smCoscheduledAlignment": self.granularity}
        return SimpleNamespace(smCount=len(self.sms), **(told if self.tells_granularity else {}))


@dataclass
class FakeDriver:
    """cuda.bindings.driver for one device. `calls`: names and arguments, in order; `live`: handle -> what it is."""

    num_sms: int = 132
    granularity: int = 8
    version: int = 13000
    capability: int = 9
    tells_granularity: bool = True
    calls: list[tuple[Any, ...]] = field(default_factory=list)
    live: dict[int, Any] = field(default_factory=dict)

    CUresult = SimpleNamespace(CUDA_SUCCESS=SUCCESS)
    CUdevResourceType = SimpleNamespace(CU_DEV_RESOURCE_TYPE_SM=1)
    CUgreenCtxCreate_flags = SimpleNamespace(CU_GREEN_CTX_DEFAULT_STREAM=1)
    CUstream_flags = SimpleNamespace(CU_STREAM_NON_BLOCKING=1)
    CUdevice_attribute = SimpleNamespace(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR=75)

    def __post_init__(self) -> None:
        self._numbers = itertools.count(1)

    def sms_of_stream(self, handle: int) -> set[int]:
        """The SMs that work on this stream may use."""
        return set(self.live[self.live[handle]])

    def cuInit(self, flags):
        return (self._noted("cuInit", flags),)

    def cuDriverGetVersion(self):
        return self._noted("cuDriverGetVersion"), self.version

    def cuDeviceGet(self, number):
        return self._noted("cuDeviceGet", number), f"device {number}"

    def cuDeviceGetAttribute(self, attribute, device):
        return self._noted("cuDeviceGetAttribute", attribute, device), self.capability

    def cuDeviceGetDevResource(self, device, kind):
        self._noted("cuDeviceGetDevResource", device, kind)
        return SUCCESS, Resource(tuple(range(self.num_sms)), 0, self.granularity, self.tells_granularity)

    def cuDevSmResourceSplitByCount(self, count, resource, flags, least):
        self._noted("cuDevSmResourceSplitByCount", count, flags, least)
        size = -(-least // self.granularity) * self.granularity
        fitting = min(count, len(resource.sms) // size)
        number = next(self._numbers)
        cut = [
            Resource(resource.sms[i * size : (i + 1) * size], number, self.granularity, self.tells_granularity)
            for i in range(fitting)
        ]
        left = Resource(resource.sms[fitting * size :], number, self.granularity, self.tells_granularity)
        return SUCCESS, cut, fitting, left

    def cuDevResourceGenerateDesc(self, resources, count):
        self._noted("cuDevResourceGenerateDesc", [len(one.sms) for one in resources], count)
        assert count == len(resources)
        if len(resources) > 1 and (self.version < 13000 or len({one.split for one in resources}) > 1):
            return 915, None  # CUDA_ERROR_INVALID_RESOURCE_CONFIGURATION
        return SUCCESS, tuple(sm for one in resources for sm in one.sms)

    def cuGreenCtxCreate(self, description, device, flags):
        self._noted("cuGreenCtxCreate", device, flags)
        handle = next(self._numbers)
        self.live[handle] = description
        return SUCCESS, handle

    def cuGreenCtxGetDevResource(self, context, kind):
        self._noted("cuGreenCtxGetDevResource", kind)
        return SUCCESS, Resource(self.live[context], 0, self.granularity, self.tells_granularity)

    def cuGreenCtxStreamCreate(self, context, flags, priority):
        self._noted("cuGreenCtxStreamCreate", flags, priority)
        handle = next(self._numbers)
        self.live[handle] = context
        return SUCCESS, handle

    def cuStreamDestroy(self, stream):
        assert self.live[stream] in self.live, "the stream's context is gone already"
        del self.live[stream]
        return (self._noted("cuStreamDestroy"),)

    def cuGreenCtxDestroy(self, context):
        del self.live[context]
        return (self._noted("cuGreenCtxDestroy"),)

    def _noted(self, name: str, *arguments: Any) -> int:
        self.calls.append((name, *arguments))
        return SUCCESS


class FakeStreams:
    """torch.cuda's streams and events as a record: which events were recorded where, and who waits for what.

    `done_before(a, b)`: whether b's stream waited for a, directly or through others, before b was launched: on a real
    GPU the two may run at the same time otherwise.
    """

    def __init__(self) -> None:
        self.current = self.Stream(self, "caller")
        self._names = itertools.count()

    class Stream:
        def __init__(self, cuda: FakeStreams, name: str) -> None:
            self.cuda, self.name = cuda, name
            self.seen: set[Any] = set()  # all that is done before whatever is launched here next

        def wait_stream(self, other: FakeStreams.Stream) -> None:
            self.seen |= other.seen

        def wait_event(self, event: frozenset[Any]) -> None:
            self.seen |= event

        def record_event(self) -> frozenset[Any]:
            return frozenset(self.seen)

    class Event:
        """Elapsed time is 1 ms for every event made since."""

        made = 0

        def __init__(self, enable_timing: bool = False) -> None:
            type(self).made += 1
            self.number = type(self).made

        def record(self) -> None:
            pass

        def synchronize(self) -> None:
            pass

        def elapsed_time(self, other: FakeStreams.Event) -> float:
            return float(other.number - self.number)

    def new(self, handle: object = None, priority: int = 0) -> FakeStreams.Stream:
        return self.Stream(self, f"stream {next(self._names)}" if handle is None else f"stream {handle}")

    def stream(self, stream: FakeStreams.Stream) -> _Current:
        return _Current(self, stream)

    def launch(self, action: Any) -> frozenset[Any]:
        """Launch on the current stream; what is certainly done before it."""
        before = frozenset(self.current.seen)
        self.current.seen.add(action)
        return before


class _Current:
    def __init__(self, cuda: FakeStreams, stream: FakeStreams.Stream) -> None:
        self._cuda, self._stream, self._before = cuda, stream, cuda.current

    def __enter__(self) -> None:
        self._cuda.current = self._stream

    def __exit__(self, *exc: object) -> None:
        self._cuda.current = self._before
