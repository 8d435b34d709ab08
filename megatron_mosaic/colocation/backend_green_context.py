"""Quotas on an NVIDIA GPU: a stream of a green context for every track, so that it has SMs of its own.

The choice of a quota is the choice of a stream: no context is ever made current, which backward would not see.
Whatever runs on an ordinary stream uses all SMs, quotas included: only lanes run while lanes are open.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch

from megatron_mosaic.colocation.backend_streams import StreamLanes, why_no_cuda
from megatron_mosaic.colocation.lane import Caps, LaneInfo, Lanes
from megatron_mosaic.colocation.sm_split import LEAST_DRIVER, GreenLane, SmDriver
from megatron_mosaic.errors import QuotaError
from megatron_mosaic.plan.quota import grant_shares


class GreenLanes(StreamLanes):
    """Streams of green contexts, destroyed with `close`."""

    def __init__(self, infos: Mapping[int, LaneInfo], lanes: Mapping[int, GreenLane], driver: SmDriver) -> None:
        streams = {track: torch.cuda.ExternalStream(int(lane.stream)) for track, lane in lanes.items()}
        super().__init__(infos, streams, torch.cuda.Stream())
        self._driver, self._lanes = driver, lanes

    def close(self) -> None:
        super().close()
        self._driver.close(self._lanes)


class GreenContextBackend:
    """One disjoint split of the device's SMs. Lanes of the same counts are opened once."""

    name = "green_context"
    caps = Caps(beside=True, enforced=True, disjoint=True)

    def __init__(self, driver: Any = None, device: int | None = None) -> None:
        """`driver`: cuda.bindings.driver, loaded when it is first needed. `device`: CUDA's number; the current one."""
        self._given, self._number = driver, device
        self._opened: dict[tuple[tuple[int, int], ...], GreenLanes] = {}

    def why_not(self) -> str:
        if self._given is None and (why := why_no_cuda()):
            return why
        try:
            version = self._driver.version()
        except ImportError as error:
            return f"no cuda-bindings: {error}"
        except (RuntimeError, QuotaError) as error:  # the bindings find no driver, or it does not answer
            return f"no CUDA driver: {error}"
        return "" if version >= LEAST_DRIVER else f"CUDA {version} of the driver, {LEAST_DRIVER} needed"

    def quantise(self, shares: Mapping[int, float]) -> dict[int, LaneInfo]:
        hardware = self._driver.hardware(self._device)
        granted = grant_shares(shares, hardware.num_sms, hardware.granularity)
        return {
            track: LaneInfo(track=track, share=shares[track], granted=sms, total=hardware.num_sms, unit="SMs")
            for track, sms in granted.items()
        }

    def open(self, shares: Mapping[int, float]) -> Lanes:
        infos = self.quantise(shares)
        key = tuple((track, info.granted) for track, info in infos.items())
        if key not in self._opened:
            lanes = self._driver.split(self._device, dict(key))
            self._opened[key] = GreenLanes(infos, lanes, self._driver)
        return self._opened[key]

    @cached_property
    def _driver(self) -> SmDriver:
        return SmDriver(self._given or importlib.import_module("cuda.bindings.driver"))

    @cached_property
    def _device(self) -> Any:
        return self._driver.device(torch.cuda.current_device() if self._number is None else self._number)
