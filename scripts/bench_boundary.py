"""Markdown table: hand-over of rows between two layouts, ours against Megatron's bridge communicators, in one run.

bytes   all that crosses between ranks, over the least possible: each row once to every rank that needs and lacks it.
        A send counts its size, a broadcast in a group of n (n - 1) times it, an all-gather (n - 1) times every piece.
time    of the slowest rank, from a barrier until its rows are there and its sends have left; median of the repeats.
        A turn is ours, upstream, ours, upstream; noise is how far the medians of two halves of the same thing differ.
routes  what ours computes from a batch's metadata; the first time, and again for the same shapes.

Megatron's bridge logs the sum of every tensor it moves, whatever the log level. Here that sum costs nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import bench_layouts as layouts
import torch
import torch.distributed as dist
from bench_layouts import WIDTH, Border

from megatron_mosaic.launch.forked import run_forked
from megatron_mosaic.parallel_state_ext.boundaries.channels.row_channel import RowChannel
from megatron_mosaic.parallel_state_ext.boundaries.edge_end import EdgeEnd
from megatron_mosaic.parallel_state_ext.boundaries.step_map import RouteCache, StepMap
from megatron_mosaic.parallel_state_ext.rebound import cpu

Rows = torch.Tensor | None  # none on a rank that is not at that end


class Ours:
    """StepMap and RowChannels."""

    def __init__(self, border: Border) -> None:
        self._border, self._rank, self._metadata = border, dist.get_rank(), [border.metadata()]
        self.source, self.target = EdgeEnd.source_of(border.edge), EdgeEnd.target_of(border.edge)
        self._first = border.plan_map(self._rank, RouteCache(capacity=0))  # forgets all when a step begins
        self._again = border.plan_map(self._rank)
        self._map = StepMap(self._again, self._metadata)
        self._channels = {
            sender: RowChannel(
                (dist.new_group(), dist.new_group()), width=WIDTH, dtype=torch.float32, device=torch.device("cpu")
            )
            for sender in (self.source, self.target)
        }

    def route(self, *, cached: bool = False) -> None:
        """Everything that a step asks for, both directions."""
        step_map = StepMap(self._again if cached else self._first, self._metadata)
        for end in (self.source, self.target):
            if self.holds(end):
                step_map.rows(end, 0)
                step_map.sends(end, 0, 0)
                step_map.receives(end, 0, 0)

    def holds(self, end: EdgeEnd) -> bool:
        return self._rank in self._border.holders(end)

    def example(self, end: EdgeEnd) -> Rows:
        """Rows of this rank, numbered by item and token."""
        if not self.holds(end):
            return None
        shard, held = self._map.shard(end.module, 0), self._map.rows(end, 0)
        items = torch.tensor(shard.items)[torch.as_tensor(held.items)]
        numbers = 1024 * items + torch.as_tensor(shard.tokens[held.tokens])
        return (numbers.float()[:, None] + torch.arange(WIDTH) / 1024).contiguous()

    def forward(self, rows: Rows) -> Rows:
        return self._carry(rows, self.source)

    def backward(self, rows: Rows) -> Rows:
        return self._carry(rows, self.target)

    def _carry(self, rows: Rows, sender: EdgeEnd) -> Rows:
        channel, receiver = self._channels[sender], sender.opposite
        if rows is not None:
            channel.send(0, self._map.sends(sender, 0, 0), rows)
        got = None
        if self.holds(receiver):
            arrival = channel.begin(len(self._map.rows(receiver, 0)))
            channel.expect(arrival, 0, self._map.receives(receiver, 0, 0))
            got = channel.take(arrival)
        channel.drain()
        return got

    @property
    def sent_bytes(self) -> int:
        return sum(channel.sent_bytes for channel in self._channels.values())


class Upstream:
    """The communicator of megatron-core that fits: colocated where the sides share ranks, else the bridge."""

    def __init__(self, border: Border) -> None:
        from megatron.core.hyper_comm_grid import HyperCommGrid
        from megatron.core.models.mimo.comm.colocated_communicator import ColocatedBridgeCommunicator
        from megatron.core.pipeline_parallel.bridge_communicator import BridgeCommunicator

        self._border, self._meter = border, _SentBytes()
        grids = []
        for placed in (border.source, border.target):
            shape = [placed.layout.tp, placed.layout.cp, placed.layout.pp, placed.layout.dp]
            names = ["tp", "cp", "pp", "dp"]
            grids.append(HyperCommGrid(shape, names, rank_offset=placed.ranks.ranks[0], backend="gloo"))
        if border.colocated:
            self._bridge = ColocatedBridgeCommunicator(*grids, dim_mapping={"b": 0, "h": 1})
        else:
            self._bridge = BridgeCommunicator(*grids, comm_dtype=torch.float32, tensor_ndim=2)
        rank = dist.get_rank()
        self._at_source, self._at_target = (rank in placed.ranks.ranks for placed in (border.source, border.target))

    def forward(self, rows: Rows) -> Rows:
        with self._meter.counting(), torch.enable_grad():
            if self._border.colocated:
                if rows is None:
                    return None
                self._input = rows.detach().requires_grad_()
                self._output = self._bridge.communicate(self._input)
                return self._output.detach()
            if self._at_source:
                self._bridge.send_forward(rows)
            return self._bridge.recv_forward().detach() if self._at_target else None

    def backward(self, rows: Rows) -> Rows:
        with self._meter.counting():
            if self._border.colocated:
                return None if rows is None else torch.autograd.grad(self._output, self._input, rows)[0]
            if self._at_target:
                self._bridge.send_backward(rows)
            return self._bridge.recv_backward() if self._at_source else None

    @property
    def sent_bytes(self) -> int:
        return self._meter.sent_bytes


class _SentBytes:
    """Counts what torch.distributed sends for somebody else's code, and keeps its log lines from costing time."""

    def __init__(self) -> None:
        self.sent_bytes = 0

    @contextlib.contextmanager
    def counting(self) -> Iterator[None]:
        real = {name: getattr(dist, name) for name in _COUNTED}
        for name, count in _COUNTED.items():
            setattr(dist, name, self._wrap(real[name], count))
        real_sum, torch.Tensor.sum = torch.Tensor.sum, lambda tensor: "?"  # type: ignore[method-assign]
        try:
            yield
        finally:
            torch.Tensor.sum = real_sum  # type: ignore[method-assign]
            for name, function in real.items():
                setattr(dist, name, function)

    def _wrap(self, function: Callable[..., Any], count: Callable[..., int]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            self.sent_bytes += count(*args, **kwargs)
            return function(*args, **kwargs)

        return counted


def _size(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


_COUNTED: dict[str, Callable[..., int]] = {
    "send": lambda tensor, *_, **__: _size(tensor),
    "broadcast": lambda tensor, src, group: (
        (dist.get_world_size(group) - 1) * _size(tensor) if src == dist.get_rank() else 0
    ),
    "all_gather_into_tensor": lambda out, own, group: (dist.get_world_size(group) - 1) * _size(own),
    "batch_isend_irecv": lambda ops: sum(_size(op.tensor) for op in ops if op.op is dist.isend),
}


# -- measuring ---------------------------------------------------------------------------------------------------


def slowest(value: float) -> float:
    worst = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    return float(worst)


def total(value: int) -> int:
    summed = torch.tensor(value)
    dist.all_reduce(summed)
    return int(summed)


def timed(work: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[float, Any]:
    """Seconds that the slowest rank took, and this rank's result."""
    dist.barrier()
    start_s = time.perf_counter()
    result = work(*args, **kwargs)
    return slowest(time.perf_counter() - start_s), result


def measure(border: Border, repeats: int) -> dict[str, Any]:
    """One row of the table, on every rank the same."""
    ours = Ours(border)
    result: dict[str, Any] = {"border": border.name, "samples": border.samples}
    ways: dict[str, Ours | Upstream] = {"ours": ours}
    wrong = compare(border, "ours", ours)
    assert not wrong, f"{border.name}: {wrong}"
    refused = agree(try_upstream(border, ways))
    if refused:
        ways.pop("upstream", None)
        result["refused"] = refused
    result["least_bytes"] = border.least_bytes(forward=True) + border.least_bytes(forward=False)
    turns = [(name, ways[name]) for name in (*ways, *ways)]
    for name, way in ways.items():
        before = way.sent_bytes
        way.backward((way.forward(ours.example(ours.source)), ours.example(ours.target))[1])
        result[f"{name}_bytes"] = total(way.sent_bytes - before)
    times: dict[str, list[list[float]]] = {f"{n}_{d}": [[], []] for n in ways for d in ("forward", "backward")}
    x, gradient = ours.example(ours.source), ours.example(ours.target)
    for _ in range(repeats):
        for number, (name, way) in enumerate(turns):
            half = number // len(ways)
            times[f"{name}_forward"][half].append(timed(way.forward, x)[0])
            times[f"{name}_backward"][half].append(timed(way.backward, gradient)[0])
    for key, halves in times.items():
        result[f"{key}_s"] = statistics.median(halves[0] + halves[1])
    result["noise_frac"] = noise(times, ways)
    ours.route(cached=True)
    for cached, key in ((False, "routes_first_s"), (True, "routes_cached_s")):
        result[key] = statistics.median(timed(ours.route, cached=cached)[0] for _ in range(max(3, repeats)))
    return result


def try_upstream(border: Border, ways: dict[str, Ours | Upstream]) -> str:
    """Why upstream cannot do this border; empty if it can."""
    try:
        ways["upstream"] = Upstream(border)
        wrong = compare(border, "upstream", ways["upstream"])
        return f"not refused, but {wrong}" if wrong else ""
    except (ValueError, AssertionError) as error:
        return f"refused: {error}"


def compare(border: Border, name: str, way: Ours | Upstream) -> str:
    """Empty if this rank got the rows that it asked for, bit by bit; else what is wrong with them."""
    known = Ours(border)
    wrong = ""
    for sender, carry in ((known.source, way.forward), (known.target, way.backward)):
        got, expected = carry(known.example(sender)), known.example(sender.opposite)
        if expected is None or (got is not None and torch.equal(got, expected)):
            continue
        rows = "no" if got is None else len(got)
        wrong = (
            wrong
            or f"{'forward' if sender.is_source else 'backward'} gives {rows} rows instead of these {len(expected)}"
        )
    return wrong


def agree(message: str) -> str:
    """The first message that a rank has. Collective."""
    messages: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(messages, message)
    return next((m for m in messages if m), "")


def noise(times: dict[str, list[list[float]]], ways: dict[str, Any]) -> float:
    """How far the two halves of one thing's forward plus backward differ: the larger over the smaller, less 1."""
    worst = 0.0
    for name in ways:
        halves = [
            statistics.median(a + b for a, b in zip(times[f"{name}_forward"][h], times[f"{name}_backward"][h]))
            for h in (0, 1)
        ]
        worst = max(worst, max(halves) / min(halves) - 1)
    return worst


def measure_all(repeats: int, only: str, path: str) -> None:
    dist.init_process_group("gloo", timeout=timedelta(seconds=30))
    found = [measure(border, repeats) for border in layouts.BORDERS if only in border.name]
    if dist.get_rank() == 0:
        Path(path).write_text(json.dumps(found, indent=1), encoding="utf-8")
    dist.barrier()


# -- the table ---------------------------------------------------------------------------------------------------


def render_row(row: dict[str, Any]) -> str:
    least = row["least_bytes"]

    def bytes_of(name: str) -> str:
        moved = row[f"{name}_bytes"]
        return f"{moved / least:.2f}" if least else f"{moved} B"

    def hand_over_s(name: str) -> float:
        return float(row[f"{name}_forward_s"] + row[f"{name}_backward_s"])

    def both(name: str) -> str:
        return f"{1e3 * row[f'{name}_forward_s']:.2f} + {1e3 * row[f'{name}_backward_s']:.2f}"

    cells = [row["border"], f"{least / 1e6:.1f}", bytes_of("ours")]
    routes = f"{1e3 * row['routes_first_s']:.2f} / {1e3 * row['routes_cached_s']:.2f}"
    all_of_it_s = hand_over_s("ours") + row["routes_cached_s"]
    if "refused" in row:
        cells += ["", both("ours"), row["refused"], "", routes, f"{1e3 * all_of_it_s:.2f}", ""]
    else:
        ratio = hand_over_s("ours") / hand_over_s("upstream")
        total_ratio = all_of_it_s / hand_over_s("upstream")
        cells += [bytes_of("upstream"), both("ours"), both("upstream"), f"{ratio:.2f}"]
        cells += [routes, f"{1e3 * all_of_it_s:.2f} ({total_ratio:.2f})"]
        cells.append(f"{100 * row['noise_frac']:.0f} %")
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7, help="turns per border")
    parser.add_argument("--only", default="", help="borders whose name has this in it")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    args = parser.parse_args()
    torch.set_num_threads(1)
    cpu.install()
    import megatron.core.models.mimo.comm.colocated_communicator
    import megatron.core.pipeline_parallel.bridge_communicator  # noqa: F401  imported once, then forked

    with tempfile.TemporaryDirectory() as directory:
        path = args.json or Path(directory) / "found.json"
        run_forked(layouts.WORLD_SIZE, measure_all, args.repeats, args.only, str(path))
        found = json.loads(path.read_text(encoding="utf-8"))
    print("| border | least MB | ours / least | upstream / least | ours ms | upstream ms | ours / upstream |", end="")
    print(" routes ms: first / again | ours with routes again (over upstream) | noise |")
    print("|---" * 10 + "|")
    for row in found:
        print(render_row(row))


if __name__ == "__main__":
    main()
