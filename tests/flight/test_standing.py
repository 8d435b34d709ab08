"""Where a rank's main thread stands, as its heart sees it, in real waits between two ranks."""

import time

import pytest
import torch
import torch.distributed as dist

from megatron_mosaic.flight.line import WAIT, Flight, Pulse, read_lines
from megatron_mosaic.parallel_state_ext.boundaries.channels.row_channel import RowChannel
from megatron_mosaic.parallel_state_ext.boundaries.routes import Part
from tests.forked import run_gloo

pytestmark = pytest.mark.dist


def receive_rows(channel: RowChannel) -> torch.Tensor:
    arrival = channel.begin(2)
    channel.expect(arrival, "unit", [Part(rank=1, rows=slice(0, 2), num_rows=2)])
    return channel.take(arrival)


def wait_in_every_way() -> None:
    """Rank 0 waits three times; rank 1 looks at it each time before it lets it go on."""
    flight = Flight(dist.get_rank())
    groups = (dist.new_group([0, 1]), dist.new_group([0, 1]))
    channel = RowChannel(groups, width=3, dtype=torch.float32, device=torch.device("cpu"))
    tensor = torch.ones(2, 3)
    ways = {
        "recv": (lambda: dist.recv(tensor, src=1), lambda: dist.send(tensor, dst=0), "<lambda> (test_standing.py"),
        "all_reduce": (lambda: dist.all_reduce(tensor),) * 2 + ("<lambda> (test_standing.py",),
        WAIT: (
            lambda: receive_rows(channel),
            lambda: (channel.send("unit", [Part(rank=0, rows=slice(0, 2), num_rows=2)], tensor), channel.drain()),
            "take (incoming.py",
        ),
    }
    for call, (wait, let_go, place) in ways.items():
        flight.note(f"at {call}")
        if dist.get_rank() == 0:
            wait()
            continue
        pulse = look_at_rank_0(flight, f"at {call}")
        assert (pulse.waits_in, pulse.peers) == (call, (1,))
        assert pulse.place.startswith(place)
        let_go()
    if dist.get_rank() == 0:
        flight.note("asleep")
        time.sleep(3.5)
    else:
        pulse = look_at_rank_0(flight, "asleep")
        assert (pulse.waits_in, pulse.peers) == ("", ())
        assert pulse.place.startswith("wait_in_every_way (test_standing.py")


def look_at_rank_0(flight: Flight, words: str) -> Pulse:
    """Its pulse once it has stood for a beat with these words."""
    while True:
        line = read_lines(flight.directory)[0]
        if line.words == words and line.pulse.still_s > 0.5:
            return line.pulse
        time.sleep(0.05)


def test_a_heart_says_in_which_call_a_rank_waits_and_for_whom() -> None:
    run_gloo(2, wait_in_every_way)
