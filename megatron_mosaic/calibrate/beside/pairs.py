"""Real Megatron blocks alone and beside each other: seconds for `interference.py` and `scripts/bench_colocation.py`.

A block's forward and backward is one unit of its side; a pair runs as many units of each, on the lanes of a quota
backend, as training does. Turns: the same units one after the other on the whole device. Turns and lanes alternate.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.transformer_block import TransformerBlock
from torch import Tensor

from megatron_mosaic.calibrate.one_rank import one_rank_plan
from megatron_mosaic.colocation.backend_cpu import CpuQuota
from megatron_mosaic.colocation.lane import Lanes
from megatron_mosaic.colocation.program import RankProgram
from megatron_mosaic.cost_model.effects.counts import count_activation_bytes
from megatron_mosaic.cost_model.effects.kernels import forward_bytes, layer_work
from megatron_mosaic.cost_model.hardware.profile import Part
from megatron_mosaic.parallel_state_ext.group_list import FIELDS
from megatron_mosaic.parallel_state_ext.rank_view import RankView
from megatron_mosaic.parallel_state_ext.rebound.cpu import device
from megatron_mosaic.parallel_state_ext.scope import Scopes
from megatron_mosaic.plan.training import TrainingSetup
from megatron_mosaic.plan.workload import ModuleConfig, Role
from megatron_mosaic.schedules import Action, Kind

NUM_LAYERS = 2
SIDES = ("first", "second")
WARM_UPS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockSize:
    """A block of two layers and its input [tokens, items, hidden]."""

    hidden: int
    tokens: int
    items: int

    @property
    def name(self) -> str:
        return f"{self.hidden}x{self.tokens}x{self.items}"

    @property
    def module(self) -> ModuleConfig:
        """The block as a module of a workload."""
        return ModuleConfig(
            name="block",
            role=Role.encoder,
            num_layers=NUM_LAYERS,
            hidden_size=self.hidden,
            num_heads=max(2, self.hidden // 64),
            ffn_hidden_size=4 * self.hidden,
            tokens_per_item=self.tokens,
            input_size=1,
            output_size=1,
        )


def make_scopes() -> Scopes:
    """Streams and scratch memory of the two sides. Needs torch.distributed, of one rank."""
    return Scopes(1, RankView.of(one_rank_plan("pair", SIDES), 0), apart=SIDES)


class Block:
    """A block with its input, on the training device: the module `side`. Its groups are the rank alone."""

    def __init__(self, size: BlockSize, dtype: torch.dtype, scopes: Scopes, side: str) -> None:
        self.size, self._dtype, self._scopes, self._side = size, dtype, scopes, side
        module = size.module
        config = TransformerConfig(
            num_layers=module.num_layers,
            hidden_size=module.hidden_size,
            num_attention_heads=module.num_heads,
            ffn_hidden_size=module.ffn_hidden_size,
            use_cpu_initialization=True,
            attention_dropout=0.0,
            hidden_dropout=0.0,
            bias_dropout_fusion=False,
            masked_softmax_fusion=False,
            gradient_accumulation_fusion=False,
            params_dtype=dtype,
        )
        groups = ProcessGroupCollection(**dict.fromkeys(FIELDS, dist.group.WORLD))
        self._block = TransformerBlock(config, get_gpt_layer_local_spec(), pg_collection=groups).to(device())
        self._input = torch.randn(size.tokens, size.items, size.hidden, dtype=dtype, device=device())
        self._slope = torch.ones_like(self._input) / self._input.numel()

    def work(self) -> None:
        """One forward and backward; gradients add up."""
        with self._scopes.enter(self._side):
            self._block(self._input, None).backward(self._slope)

    def clear(self) -> None:
        """Forget the gradients."""
        self._block.zero_grad(set_to_none=True)

    def gradients(self) -> list[Tensor]:
        return [parameter.grad.clone() for parameter in self._block.parameters() if parameter.grad is not None]

    @property
    def moved_bytes(self) -> float:
        """Of a forward and backward, three times the forward's: what its kernels read and write."""
        setup = TrainingSetup(fused_attention=False, dropout=False)
        work = layer_work(self.size.module, self.size.items, 1, 1, 1, False, True, setup)
        return 3 * NUM_LAYERS * self._dtype.itemsize / 2 * forward_bytes(work)

    @property
    def footprint_bytes(self) -> float:
        """That it comes back to: parameters, their gradients, and what the forward keeps."""
        size = self._dtype.itemsize
        kept = count_activation_bytes(self.size.module, Part.layer, 1, value_bytes=size, fused_attention=False)
        parameters = sum(parameter.numel() for parameter in self._block.parameters())
        return 2 * size * parameters + NUM_LAYERS * self.size.items * kept


def wall_s(work: Callable[[], None]) -> float:
    """Seconds until the work is done, on the device too."""
    _wait()
    started = time.perf_counter()
    work()
    _wait()
    return time.perf_counter() - started


def loaded_frac(num_threads: int, seconds: float = 0.2) -> float:
    """Share of the time of so many busy threads that others took from them: 0 on an idle machine."""
    import threading

    spent: list[float] = []

    def spin() -> None:
        matrix, started = torch.ones(192, 192), time.perf_counter()
        begun = time.thread_time()
        while time.perf_counter() - started < seconds:
            matrix @ matrix
        spent.append((time.thread_time() - begun) / (time.perf_counter() - started))

    threads = [threading.Thread(target=spin) for _ in range(num_threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return max(0.0, 1 - statistics.fmean(spent))


def alone_s(block: Block, repeats: int) -> float:
    """Median seconds of a unit, with whatever the calling thread was granted."""
    for _ in range(WARM_UPS):
        block.work()
    return statistics.median(wall_s(block.work) for _ in range(repeats))


def host_s(dtype: torch.dtype, scopes: Scopes, repeats: int) -> float:
    """Seconds of a unit whose kernels do next to nothing: what the host spends on launching them."""
    return alone_s(Block(BlockSize(hidden=16, tokens=2, items=1), dtype, scopes, SIDES[0]), repeats)


def program_of(num_units: int) -> RankProgram:
    """`first` on track 0 and `second` on track 1, so many units each, in alternation."""
    pairs = [[Action(name, 0, Kind.F, unit) for name in SIDES] for unit in range(num_units)]
    actions = tuple(action for pair in pairs for action in pair)
    tracks = {track: tuple(pair[track] for pair in pairs) for track in (0, 1)}
    return RankProgram(actions=actions, tracks=tracks, waits={})


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """A pair: seconds of every round in turns (twice, for the noise) and beside each other; equal gradients?"""

    turns_s: tuple[float, ...]
    turns_again_s: tuple[float, ...]
    beside_s: tuple[float, ...]
    is_equal: bool

    @property
    def turns_median_s(self) -> float:
        return statistics.median(self.turns_s + self.turns_again_s)

    @property
    def beside_median_s(self) -> float:
        return statistics.median(self.beside_s)

    @property
    def noise_frac(self) -> float:
        return abs(statistics.median(self.turns_again_s) / statistics.median(self.turns_s) - 1)


def measure_pair(
    blocks: tuple[Block, Block], lanes: Lanes, threads: tuple[int, int], whole: int, num_units: int, repeats: int
) -> Measured:
    """Rounds of turns, beside, turns. `threads`: of each side in its lane; `whole`: of either when it has its turn."""
    by_name = dict(zip(SIDES, blocks))
    lane_cores = CpuQuota(dict(zip(by_name, threads)))
    turn_cores = CpuQuota(dict.fromkeys(by_name, whole))
    beside = _beside(blocks, lanes, lane_cores, num_units)

    def turns(cores: CpuQuota) -> None:
        for name, block in by_name.items():
            cores.grant(name)
            for _ in range(num_units):
                block.work()

    expected, got = (_gradients_after(blocks, run) for run in (lambda: turns(lane_cores), beside))
    rounds: list[tuple[float, float, float]] = []
    for _ in range(WARM_UPS + repeats):
        rounds.append((wall_s(lambda: turns(turn_cores)), wall_s(beside), wall_s(lambda: turns(turn_cores))))
        for block in blocks:
            block.clear()
    first, middle, last = zip(*rounds[WARM_UPS:], strict=True)
    return Measured(turns_s=first, beside_s=middle, turns_again_s=last, is_equal=_is_equal(expected, got))


def beside_s(
    blocks: tuple[Block, Block], lanes: Lanes, threads: tuple[int, int], num_units: int, repeats: int
) -> float:
    """Median seconds until both sides' units have ended, beside each other."""
    run = _beside(blocks, lanes, CpuQuota(dict(zip(SIDES, threads))), num_units)
    seconds = [wall_s(run) for _ in range(WARM_UPS + repeats)]
    return statistics.median(seconds[WARM_UPS:])


def _beside(blocks: tuple[Block, Block], lanes: Lanes, cores: CpuQuota, num_units: int) -> Callable[[], None]:
    program, by_name = program_of(num_units), dict(zip(SIDES, blocks))

    def perform(action: Action) -> None:
        cores.grant(action.module)
        by_name[action.module].work()

    return lambda: lanes.run(program, perform)


def _gradients_after(blocks: Sequence[Block], run: Callable[[], None]) -> list[Tensor]:
    for block in blocks:
        block.clear()
    run()
    _wait()
    found = [gradient for block in blocks for gradient in block.gradients()]
    for block in blocks:
        block.clear()
    return found


def _is_equal(expected: Sequence[Tensor], got: Sequence[Tensor]) -> bool:
    """To the bit on a CPU. On a GPU atomics may add in another order: 1e-2 of the norm, in bf16."""
    if not expected or len(expected) != len(got):
        return False
    if expected[0].device.type == "cpu":
        return all(map(torch.equal, expected, got))
    return all(
        float((a - b).float().norm()) <= 1e-2 * float(a.float().norm()) for a, b in zip(expected, got, strict=True)
    )


def _wait() -> None:
    if device().type == "cuda":
        torch.cuda.synchronize()
