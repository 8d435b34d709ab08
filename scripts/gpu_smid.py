"""Which SMs the work of each lane really uses: a JSON line a lane. Exit status 1 if two lanes share one.

A kernel of many blocks notes %smid on the stream of every lane, and once more from a backward function whose
`backward()` is called outside of the lane: it has to show the SMs of its forward's lane. Needs a GPU with green
contexts and NVRTC (part of torch's CUDA wheels). Not yet run on a GPU.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import sys
from pathlib import Path
from typing import Any

import torch

from megatron_mosaic.colocation.backend_green_context import GreenContextBackend
from megatron_mosaic.colocation.program import RankProgram
from megatron_mosaic.schedules import Action, Kind

SHARES = ((1 / 3, 2 / 3), (0.5, 0.5), (0.25, 0.75))
BLOCKS = 4096
SOURCE = b"""
extern "C" __global__ void note_sm(int *found) {
    unsigned int sm;
    asm volatile("mov.u32 %0, %%smid;" : "=r"(sm));
    if (threadIdx.x == 0) found[blockIdx.x] = (int)sm;
    long long until = clock64() + 20000;
    while (clock64() < until) {}
}
"""


class NotingKernel:
    """The kernel, of no context: it runs in that of its stream, which a module's function would not."""

    def __init__(self) -> None:
        from cuda.bindings import driver, nvrtc

        self._driver = driver
        major, minor = torch.cuda.get_device_capability()
        program = checked(nvrtc.nvrtcCreateProgram(SOURCE, b"note_sm.cu", 0, [], []))
        checked(nvrtc.nvrtcCompileProgram(program, 1, [f"--gpu-architecture=sm_{major}{minor}".encode()]))
        self._code = b" " * checked(nvrtc.nvrtcGetCUBINSize(program))
        checked(nvrtc.nvrtcGetCUBIN(program, self._code))
        library = checked(driver.cuLibraryLoadData(self._code, [], [], 0, [], [], 0))
        self._kernel = driver.CUfunction(int(checked(driver.cuLibraryGetKernel(library, b"note_sm"))))

    def __call__(self) -> torch.Tensor:
        """[BLOCKS] numbers of the SMs on which it ran, on the current stream."""
        found = torch.full((BLOCKS,), -1, dtype=torch.int32, device="cuda")
        arguments = ((found.data_ptr(),), (ctypes.c_void_p,))
        stream = torch.cuda.current_stream().cuda_stream
        checked(self._driver.cuLaunchKernel(self._kernel, BLOCKS, 1, 1, 64, 1, 1, 0, stream, arguments, 0))
        return found


def checked(answer: tuple[Any, ...]) -> Any:
    """The value of a call of the driver or the compiler. RuntimeError if it failed."""
    if int(answer[0]):
        raise RuntimeError(str(answer[0]))
    return answer[1] if len(answer) > 1 else None


class Noting(torch.autograd.Function):
    """Notes the SMs of its backward."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, note_sms: NotingKernel, into: list[torch.Tensor]) -> torch.Tensor:
        ctx.note_sms, ctx.into = note_sms, into
        into.append(note_sms())
        return x * 1

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        ctx.into.append(ctx.note_sms())
        return gradient, None, None


def sms_of_lanes(shares: tuple[float, float], note_sms: NotingKernel) -> list[dict[str, Any]]:
    """Of each track: what was granted, and the SMs of a forward and of its backward."""
    lanes = GreenContextBackend().open(dict(enumerate(shares)))
    actions = tuple(Action(name, 0, Kind.F, 0) for name in ("first", "second"))
    program = RankProgram(actions=actions, tracks={0: actions[:1], 1: actions[1:]}, waits={})
    noted: dict[str, list[torch.Tensor]] = {action.module: [] for action in actions}
    outputs = {}

    def perform(action: Action) -> None:
        x = torch.ones(1, device="cuda", requires_grad=True)
        outputs[action.module] = Noting.apply(x, note_sms, noted[action.module])

    lanes.run(program, perform)
    for output in outputs.values():
        output.backward()  # outside of the lane
    torch.cuda.synchronize()
    return [
        {
            "track": info.track,
            "share": info.share,
            "granted": info.granted,
            "forward": sorted(set(forward.tolist())),
            "backward": sorted(set(backward.tolist())),
        }
        for info, (forward, backward) in zip(lanes.infos.values(), noted.values(), strict=True)
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.jsonl")
    out = parser.parse_args().out
    ok, note_sms = True, NotingKernel()
    for shares in SHARES:
        rows = sms_of_lanes(shares, note_sms)
        first, second = (set(row["forward"]) for row in rows)
        verdict = {
            "disjoint": first.isdisjoint(second),
            "as_granted": all(len(row["forward"]) == row["granted"] for row in rows),
            "backward_in_lane": all(set(row["backward"]) <= set(row["forward"]) for row in rows),
        }
        ok = ok and all(verdict.values())
        with out.open("a", encoding="utf-8") as file:
            for row in rows:
                file.write(json.dumps(row) + "\n")
            file.write(json.dumps({"shares": shares, **verdict}) + "\n")
        print(json.dumps({"shares": shares, **verdict}))
    return int(not ok)


if __name__ == "__main__":
    if not torch.cuda.is_available():
        sys.exit("gpu_smid: no GPU that torch can use")
    sys.exit(main())
