"""RNG streams of modules that share a process: no draw depends on another module. One process plays every rank."""

import itertools
import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from megatron.core import parallel_state, tensor_parallel
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from megatron.core.utils import GlobalMemoryBuffer

from megatron_mosaic.parallel_state_ext.rank_view import RankView
from megatron_mosaic.parallel_state_ext.rebound import cpu, lane_random
from megatron_mosaic.parallel_state_ext.scope import Scopes, stream_seed
from megatron_mosaic.plan import Layout
from megatron_mosaic.plan.layout import rank_at
from tests.cases import make_plan

NAMES = ("vision", "llm")
WIDE = ("0-31", Layout(tp=4, cp=2, dp=2, pp=2))


def of_llm(seed: int = 7, **place: int) -> Scopes:
    """Streams of the llm alone, at this place of a wide layout."""
    plan = make_plan({"llm": WIDE}, world_size=32)
    return Scopes(seed, RankView.of(plan, rank_at(plan.modules["llm"], **place)))


@pytest.fixture(autouse=True)
def own_globals(monkeypatch):
    """Megatron's globals and torch's stream as they were, afterwards."""
    cpu.install()
    monkeypatch.setattr(parallel_state, "_GLOBAL_MEMORY_BUFFER", None)
    outer, tracked = torch.get_rng_state(), get_cuda_rng_tracker().get_states()
    yield
    torch.set_rng_state(outer)
    get_cuda_rng_tracker().set_states(tracked)


def draw(scopes: Scopes, module: str) -> tuple[list[float], list[float]]:
    """Three numbers of the default stream (replicated over tp) and of the model-parallel one."""
    with scopes.enter(module):
        default = torch.rand(3).tolist()
        with get_cuda_rng_tracker().fork():
            return default, torch.rand(3).tolist()


def both() -> Scopes:
    """Streams of two modules whose first rank this is."""
    return Scopes(7, RankView.of(make_plan({"vision": ("0", Layout()), "llm": WIDE}, world_size=32), 0))


def test_where_lanes_take_turns_torch_and_megatron_stay_as_they_are(monkeypatch) -> None:
    installed = []
    monkeypatch.setattr(lane_random, "install", lambda: installed.append(True))
    get, dropout = torch.get_rng_state, torch.nn.functional.dropout
    both()
    assert type(parallel_state.get_global_memory_buffer()) is GlobalMemoryBuffer
    assert not isinstance(get_cuda_rng_tracker(), threading.local)
    assert not installed and (torch.get_rng_state, torch.nn.functional.dropout) == (get, dropout)
    Scopes(7, RankView.of(make_plan({"llm": WIDE}, world_size=32), 0), apart=NAMES)
    assert isinstance(get_cuda_rng_tracker(), threading.local) and installed


def test_a_modules_draws_do_not_depend_on_the_others() -> None:
    alone, mixed = both(), both()
    expected = [draw(alone, "llm") for _ in range(3)]
    got = []
    for _ in range(3):
        draw(mixed, "vision")
        got.append(draw(mixed, "llm"))
        torch.rand(5)  # nor on what runs outside of every module
        draw(mixed, "vision")
    assert got == expected
    assert len({str(draws) for draws in expected}) == 3, "the stream does not move"


def test_modules_do_not_share_a_stream() -> None:
    scopes = both()
    streams = [stream for module in NAMES for stream in draw(scopes, module)]
    assert len({str(stream) for stream in streams}) == 4


def test_a_modules_draws_do_not_depend_on_which_modules_its_rank_runs() -> None:
    assert draw(of_llm(), "llm") == draw(both(), "llm")


def test_tp_ranks_agree_by_default_and_differ_in_the_model_parallel_stream() -> None:
    default, sharded = zip(*(draw(of_llm(tp=tp), "llm") for tp in range(4)), strict=True)
    assert len(set(map(str, default))) == 1
    assert len(set(map(str, sharded))) == 4


def test_stages_slots_cp_ranks_and_seeds_differ() -> None:
    places = [(seed, pp, dp, cp) for seed in (7, 8) for pp, dp, cp in itertools.product(range(2), repeat=3)]
    scopes = [of_llm(seed, pp=pp, dp=dp, cp=cp) for seed, pp, dp, cp in places]
    default, sharded = zip(*(draw(scope, "llm") for scope in scopes), strict=True)
    assert len({*map(str, default), *map(str, sharded)}) == 2 * len(places)


SEEDS = st.integers(0, 2**31)
PLACES = st.tuples(SEEDS, st.sampled_from(("vision", "vision2", "llm")), *[st.integers(0, 20_000)] * 3)
MEGATRONS_OFFSETS = 1024 + 100 * 1024 + 64  # the largest, of the expert stream with 1024 experts' ranks


def seed_at(place: tuple[int, str, int, int, int]) -> int:
    seed, module, pp, dp, cp = place
    return stream_seed(seed, module, pp=pp, dp=dp, cp=cp)


@given(st.lists(PLACES, min_size=2, max_size=20, unique=True))
def test_no_two_places_seeds_are_within_megatrons_offsets(places) -> None:
    seeds = sorted(map(seed_at, places))
    assert all(after - before > MEGATRONS_OFFSETS for before, after in itertools.pairwise(seeds))
    assert seeds[0] >= 0 and seeds[-1] + MEGATRONS_OFFSETS < 2**63


def test_seeds_of_a_large_job_are_apart_for_either_generator() -> None:
    """12288 places: 62 bits for CUDA, of which the CPU's generator uses 32."""
    modules, axes = ("vision", "llm", "generator"), (range(16), range(64), range(4))
    seeds = [seed_at((1234, module, *place)) for module in modules for place in itertools.product(*axes)]
    ordered = sorted(seeds)
    assert min(after - before for before, after in itertools.pairwise(ordered)) > MEGATRONS_OFFSETS
    assert len({seed % 2**32 for seed in seeds}) == len(seeds)


def test_seeds_of_a_run_stay_what_they_are() -> None:
    """A changed formula would draw other dropout masks in a run that is resumed under another layout."""

    assert stream_seed(1234, "llm", pp=1, dp=2, cp=3) == 3722386058383752118  # sha256('1234/llm/pp1/dp2/cp3')


def test_the_outer_stream_is_put_back() -> None:
    scopes = both()
    before = torch.get_rng_state()
    draw(scopes, "vision")
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(KeyError, match="inside"):
        with scopes.enter("llm"):
            torch.rand(1)
            raise KeyError("inside")
    assert torch.equal(torch.get_rng_state(), before) and scopes.active is None


def test_scopes_do_not_nest() -> None:
    scopes = both()
    with scopes.enter("vision"), pytest.raises(AssertionError, match="llm entered while vision runs"):
        with scopes.enter("llm"):
            pass


def test_states_restore_the_streams() -> None:
    scopes = both()
    draw(scopes, "vision")
    saved = scopes.states()
    expected = [draw(scopes, module) for module in NAMES]
    other = both()
    other.restore(saved)
    assert [draw(other, module) for module in NAMES] == expected


def dropped(x: torch.Tensor) -> torch.Tensor:
    """Dropout in both streams: the derivative is the mask, so a backward with another mask shows."""
    x = torch.nn.functional.dropout(x, 0.5)
    with get_cuda_rng_tracker().fork():
        return torch.nn.functional.dropout(x, 0.5)


def test_recomputation_draws_the_forwards_numbers_again() -> None:
    """Between forward and backward the other module draws; recomputation has to see its own old numbers, and must not
    move anybody's stream."""
    scopes, quiet = both(), both()
    x = torch.ones(200, requires_grad=True)
    with scopes.enter("llm"):
        output = tensor_parallel.checkpoint(dropped, False, x)
    draw(scopes, "vision")
    with scopes.enter("llm"):
        output.sum().backward()
    torch.testing.assert_close(x.grad, output.detach(), rtol=0, atol=0)  # x is 1: output and derivative are the mask
    assert 0 < (x.grad == 0).sum() < 200

    with quiet.enter("llm"):
        dropped(torch.ones(200))
    draw(quiet, "vision")
    assert [draw(scopes, module) for module in NAMES] == [draw(quiet, module) for module in NAMES]
