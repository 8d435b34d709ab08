"""SMs of one GPU split into disjoint green contexts, with the driver's calls through cuda-bindings.

    device's SMs --one split--> n groups of q SMs + the remainder      132 for {0: 88, 1: 44}: 1 x 88, 44 left
                    a lane = one group, or several glued together;     132 for {0: 40, 1: 44, 2: 48}: 11 x 8, 44 left
                    the last lane may be the remainder

One split only: two splits of one device describe the same SMs. Several glued groups of one split need CUDA 13.0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_mosaic.errors import QuotaError

LEAST_DRIVER = 12080  # green contexts with streams of their own
GLUING_DRIVER = 13000  # several groups in one descriptor


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """SMs of a device, and how many at a time it grants."""

    num_sms: int
    granularity: int


@dataclass(frozen=True, slots=True, kw_only=True)
class GreenLane:
    """A green context with its stream. `granted`: SMs, as the driver says they are."""

    context: Any
    stream: Any
    granted: int


class SmDriver:
    """The driver's calls, checked. `driver`: cuda.bindings.driver, or what stands in for it."""

    def __init__(self, driver: Any) -> None:
        self._driver = driver

    def version(self) -> int:
        """Of CUDA, 13000 for 13.0."""
        return int(self._call("cuDriverGetVersion"))

    def device(self, number: int) -> Any:
        self._call("cuInit", 0)
        return self._call("cuDeviceGet", number)

    def hardware(self, device: Any) -> Hardware:
        """Count and granularity of the device's SMs."""
        sm = self._resource(device).sm
        # Bindings before 13.1 do not tell; the header does: 8 from compute capability 9.0 on, 4 on 8.x, 2 on 7.x.
        told = max(int(getattr(sm, "minSmPartitionSize", 0)), int(getattr(sm, "smCoscheduledAlignment", 0)))
        return Hardware(num_sms=int(sm.smCount), granularity=told or self._granularity_of(device))

    def split(self, device: Any, granted: Mapping[int, int]) -> dict[int, GreenLane]:
        """Lanes of disjoint SMs, `granted` of them each. QuotaError if the driver grants something else."""
        hardware = self.hardware(device)
        in_groups, remainder = _divide(granted, hardware)
        if not in_groups:
            raise QuotaError("SM split", got=dict(granted), expected="two lanes or more", fix="take no backend")
        is_glued = len(in_groups) > 1
        if is_glued and self.version() < GLUING_DRIVER:
            raise QuotaError(
                "quota of " + ", ".join(map(str, granted)),
                got=f"lanes of {list(granted.values())} SMs and CUDA {self.version()}",
                expected=f"CUDA {GLUING_DRIVER} for more than one lane beside the remainder",
                fix="let two modules share the whole GPU, or upgrade the driver",
            )
        size = hardware.granularity if is_glued else next(iter(in_groups.values()))
        count = sum(in_groups.values()) // size
        groups, _, left = self._call_many("cuDevSmResourceSplitByCount", count, self._resource(device), 0, size)
        lanes, first = {}, 0
        for track, sms in in_groups.items():
            lanes[track] = self._open(device, groups[first : first + sms // size], sms)
            first += sms // size
        if remainder is not None:
            lanes[remainder] = self._open(device, [left], granted[remainder])
        return {track: lanes[track] for track in granted}

    def close(self, lanes: Mapping[int, GreenLane]) -> None:
        """Streams first: what a context leaves behind cannot be used any more."""
        for lane in lanes.values():
            self._call("cuStreamDestroy", lane.stream)
        for lane in lanes.values():
            self._call("cuGreenCtxDestroy", lane.context)

    def _open(self, device: Any, resources: list[Any], expected: int) -> GreenLane:
        driver = self._driver
        description = self._call("cuDevResourceGenerateDesc", list(resources), len(resources))
        flags = driver.CUgreenCtxCreate_flags.CU_GREEN_CTX_DEFAULT_STREAM
        context = self._call("cuGreenCtxCreate", description, device, flags)
        granted = int(self._call("cuGreenCtxGetDevResource", context, self._sm_type).sm.smCount)
        if granted != expected:
            raise QuotaError(
                "SM split", got=f"{granted} SMs", expected=f"{expected}, as asked", fix="report this, with the driver"
            )
        stream = self._call("cuGreenCtxStreamCreate", context, driver.CUstream_flags.CU_STREAM_NON_BLOCKING, 0)
        return GreenLane(context=context, stream=stream, granted=granted)

    @property
    def _sm_type(self) -> Any:
        return self._driver.CUdevResourceType.CU_DEV_RESOURCE_TYPE_SM

    def _resource(self, device: Any) -> Any:
        return self._call("cuDeviceGetDevResource", device, self._sm_type)

    def _granularity_of(self, device: Any) -> int:
        major = self._driver.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR
        return {7: 2, 8: 4}.get(int(self._call("cuDeviceGetAttribute", major, device)), 8)

    def _call(self, name: str, *arguments: Any) -> Any:
        values = self._call_many(name, *arguments)
        return values[0] if values else None

    def _call_many(self, name: str, *arguments: Any) -> tuple[Any, ...]:
        """Arguments by position: their names differ between releases of the bindings."""
        status, *values = getattr(self._driver, name)(*arguments)
        if status != self._driver.CUresult.CUDA_SUCCESS:
            raise QuotaError(
                name,
                got=str(status),
                expected="CUDA_SUCCESS",
                fix="report this with the driver's version; --mosaic-quota-backend streams works without shares",
            )
        return tuple(values)


def _divide(granted: Mapping[int, int], hardware: Hardware) -> tuple[dict[int, int], int | None]:
    """Lanes that are whole groups, with their SMs; and the lane that takes the remainder, if all SMs are granted.

    The remainder carries weaker guarantees, so it goes to the lane that cannot be a group; else to the smallest.
    """
    if sum(granted.values()) < hardware.num_sms:
        return dict(granted), None
    odd = [track for track, sms in granted.items() if sms % hardware.granularity]
    remainder = odd[0] if odd else min(granted, key=lambda track: granted[track])
    return {track: sms for track, sms in granted.items() if track != remainder}, remainder
