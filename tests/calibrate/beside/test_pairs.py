"""Blocks beside each other: the same gradients as in turns, and a bench that will not speak on a loaded machine."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_mosaic.parallel_state_ext.rebound import cpu

cpu.install()

from megatron_mosaic.calibrate.beside import pairs  # noqa: E402
from megatron_mosaic.calibrate.beside.pairs import Block, BlockSize, make_scopes, measure_pair, program_of  # noqa: E402
from megatron_mosaic.colocation.backend_cpu import CpuBackend, cores_of_rank  # noqa: E402
from megatron_mosaic.parallel_state_ext.lane_state import lane_thread  # noqa: E402

SCRIPT = Path(__file__).resolve().parents[3] / "scripts" / "bench_colocation.py"
TINY = BlockSize(hidden=32, tokens=8, items=2)


@pytest.fixture
def blocks():
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    scopes = make_scopes()
    yield tuple(Block(TINY, torch.float32, scopes, side) for side in pairs.SIDES)
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore:2 tracks")
def test_blocks_beside_have_the_gradients_of_turns(blocks, monkeypatch) -> None:
    own = cores_of_rank()[:2]  # one thread each, see BENCH
    monkeypatch.setattr("megatron_mosaic.colocation.backend_cpu.cores_of_rank", lambda: own)
    lanes = CpuBackend(lane_thread).open({0: 0.5, 1: 0.5})
    found = measure_pair(blocks, lanes, (1, 1), 1, num_units=3, repeats=2)
    lanes.close()
    assert found.is_equal and len(found.beside_s) == len(found.turns_s) == 2 and min(found.beside_s) > 0
    assert [str(action) for action in program_of(2).actions] == [
        "first.0F0",
        "second.0F0",
        "first.0F1",
        "second.0F1",
    ]


def test_a_side_whose_work_is_lost_is_seen(blocks, monkeypatch) -> None:
    class OneSided:
        def run(self, program, perform):
            for action in program.tracks[0]:
                perform(action)

    assert not measure_pair(blocks, OneSided(), (1, 1), 1, num_units=2, repeats=1).is_equal


def test_moved_bytes_grow_with_the_block(blocks) -> None:
    larger = Block(BlockSize(hidden=64, tokens=8, items=2), torch.float32, make_scopes(), "first")
    weights = 4 * sum(parameter.numel() for parameter in blocks[0]._block.parameters())
    assert 2 * weights < blocks[0].moved_bytes < larger.moved_bytes


# In a process of its own: it computes on several threads, and a rank forked from a process that has would hang.
BENCH = """
import runpy, sys
from megatron_mosaic.parallel_state_ext.rebound import cpu
cpu.install()
from megatron_mosaic.calibrate.beside import pairs
taken_frac, script, out = sys.argv[1:]
pairs.loaded_frac = lambda *args: float(taken_frac)
pairs.wall_s = lambda work: (work(), 1e-3)[1]
sys.argv = [script, "--quick", "--json", "--out", out]
runpy.run_path(script, run_name="__main__")
"""


@pytest.mark.parametrize(("taken_frac", "status"), [(0.5, 1), pytest.param(0.0, 0, marks=pytest.mark.slow)])
def test_the_bench_gives_no_ratio_on_a_loaded_machine(taken_frac, status, tmp_path) -> None:
    command = [sys.executable, "-c", BENCH, str(taken_frac), str(SCRIPT), str(tmp_path / "rows.jsonl")]
    ended = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    result = json.loads(ended.stdout.splitlines()[-1])
    assert ended.returncode == status and result["loaded"] is bool(status) and result["parity_ok"]
    assert all(("gain" in pair) is not result["loaded"] for pair in result["pairs"])
    assert all(("predicted_gain" in pair) is not result["loaded"] for pair in result["pairs"])
    stages = [json.loads(line)["stage"] for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert stages[0] == "machine" and stages.count("pair") == len(result["pairs"])
