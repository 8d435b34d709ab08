"""What lanes in threads must not share: each entry of lane_state's table, and what happens where it is shared.

The oracle of every test is the same work on one thread. Two threads meet at a barrier wherever they could disturb each
other, so that the broken variants fail every time.
"""

import contextlib
import threading
from collections.abc import Callable
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.tensor_parallel import random
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from megatron.core.utils import GlobalMemoryBuffer

from megatron_mosaic.errors import RankFailure
from megatron_mosaic.parallel_state_ext import lane_state, scope
from megatron_mosaic.parallel_state_ext.boundaries.channels import row_channel
from megatron_mosaic.parallel_state_ext.boundaries.channels.row_channel import RowChannel
from megatron_mosaic.parallel_state_ext.boundaries.step_map import RouteCache
from megatron_mosaic.parallel_state_ext.grids import Grids
from megatron_mosaic.parallel_state_ext.lane_state import lane_thread
from megatron_mosaic.parallel_state_ext.rank_view import RankView
from megatron_mosaic.parallel_state_ext.rebound import cpu, lane_random
from megatron_mosaic.parallel_state_ext.scope import Scopes
from megatron_mosaic.plan import Layout
from megatron_mosaic.runtime.step import Batches
from tests.cases import make_plan
from tests.forked import run_gloo

NAMES = ("vision", "llm")
ROUNDS = 20


@pytest.fixture(autouse=True)
def own_globals(monkeypatch):
    """Megatron's globals and torch's stream as they were, afterwards."""
    cpu.install()
    lane_random.install()
    monkeypatch.setattr(parallel_state, "_GLOBAL_MEMORY_BUFFER", None)
    monkeypatch.setattr(random, "_CUDA_RNG_STATE_TRACKER", random.get_cuda_rng_tracker())
    outer = torch.get_rng_state()
    yield
    torch.set_rng_state(outer)


def make_scopes() -> Scopes:
    return Scopes(7, RankView.of(make_plan(dict.fromkeys(NAMES, ("0", Layout())), world_size=1), 0), apart=NAMES)


def run_beside(*bodies: Callable[[], None]) -> None:
    """Each body in a lane's thread; the first error is raised here."""
    errors: list[BaseException] = []

    def run(body: Callable[[], None]) -> None:
        try:
            with lane_thread(True):
                body()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(body,), daemon=True) for body in bodies]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    if errors:
        raise errors[0]


def drop(x: torch.Tensor, meet: Callable[[], object]) -> torch.Tensor:
    """Dropout from both streams; others may draw in between."""
    meet()
    x = torch.nn.functional.dropout(x, 0.5)
    meet()
    with get_cuda_rng_tracker().fork():
        meet()
        return torch.nn.functional.dropout(x, 0.5)


def masks(scopes: Scopes, module: str, meet: Callable[[], object]) -> list[list[float]]:
    """The gradient of recomputed dropout, a few times: its masks, drawn in forward and again in backward."""
    found = []
    for _ in range(ROUNDS):
        x = torch.ones(40, requires_grad=True)
        with scopes.enter(module):
            y = tensor_parallel.checkpoint(lambda z: drop(z, meet), False, x)
        with scopes.enter(module):
            y.sum().backward()
        assert torch.equal(x.grad, y.detach()), "recomputation drew another mask"
        found.append(y.tolist())
    return found


def masks_of_threads() -> dict[str, list[list[float]]]:
    scopes, barrier, found = make_scopes(), threading.Barrier(len(NAMES), timeout=5), {}

    def body(module: str) -> None:
        try:
            found[module] = masks(scopes, module, barrier.wait)
        except BaseException:
            barrier.abort()
            raise

    run_beside(*(lambda module=module: body(module) for module in NAMES))
    return found


def masks_in_turn() -> dict[str, list[list[float]]]:
    scopes = make_scopes()
    return {module: masks(scopes, module, lambda: None) for module in NAMES}


def test_modules_in_two_threads_draw_what_they_draw_in_turn() -> None:
    expected = masks_in_turn()
    assert masks_of_threads() == expected
    assert expected["vision"] != expected["llm"] and len({str(mask) for mask in expected["llm"]}) == ROUNDS


def draws_are_wrong() -> bool:
    """Whether two threads fail, or draw what they would not draw in turn."""
    expected = masks_in_turn()
    try:
        return masks_of_threads() != expected
    except (AssertionError, RuntimeError):
        return True


class OfTheProcess:
    """ActiveModule as a plain object: one for all threads."""

    name, begin, end = lane_state.ActiveModule.name, lane_state.ActiveModule.begin, lane_state.ActiveModule.end

    def __init__(self) -> None:
        self._name: str | None = None


def test_a_shared_active_module_is_a_module_entered_twice(monkeypatch) -> None:
    monkeypatch.setattr(scope, "ACTIVE", OfTheProcess())
    with pytest.raises(AssertionError, match="entered while"):
        masks_of_threads()


def test_a_shared_tracker_draws_wrong_masks(monkeypatch) -> None:
    monkeypatch.setattr(scope, "keep_tracker_by_thread", lambda: None)
    assert draws_are_wrong()


def test_a_shared_generator_draws_wrong_masks(monkeypatch) -> None:
    one = lane_random._OfThread()

    class ForAll:
        generators = one.generators

    monkeypatch.setattr(lane_random, "_of_thread", ForAll())
    assert draws_are_wrong()


def test_grad_mode_is_the_lanes_own() -> None:
    with torch.no_grad():  # a new thread starts with gradients whatever its maker does; evaluation must not
        found = []
        run_beside(lambda: found.append(torch.is_grad_enabled()))

        def evaluate() -> None:
            with lane_thread(False):
                found.append(torch.is_grad_enabled())

        bare = threading.Thread(target=lambda: found.append(torch.is_grad_enabled()))
        bare.start()
        bare.join()
        run_beside(evaluate)
    assert found == [True, True, False]


def gathered() -> dict[str, float]:
    """What each of two threads finds in scratch memory that it filled, after the other has filled its own."""
    scopes, barrier, found = make_scopes(), threading.Barrier(2, timeout=5), {}
    parallel_state.get_global_memory_buffer().get_tensor((8,), torch.float32, "mpu")  # a shared one exists by now

    def body(module: str, value: float) -> None:
        with scopes.enter(module):
            mine = parallel_state.get_global_memory_buffer().get_tensor((8,), torch.float32, "mpu")
            mine.fill_(value)
            barrier.wait()
            found[module] = float(mine.sum())

    run_beside(lambda: body("vision", 1.0), lambda: body("llm", 2.0))
    return found


def test_scratch_memory_is_the_modules_own() -> None:
    assert gathered() == {"vision": 8.0, "llm": 16.0}


def test_shared_scratch_memory_is_overwritten(monkeypatch) -> None:
    monkeypatch.setattr(lane_state, "LaneMemory", GlobalMemoryBuffer)
    found = gathered()
    assert found["vision"] == found["llm"]


def test_scopes_made_meanwhile_leave_scratch_memory_and_tracker_alone() -> None:
    """A checkpoint draws fresh streams in the middle of a run."""
    scopes = make_scopes()
    with scopes.enter("vision"):
        mine = parallel_state.get_global_memory_buffer().get_tensor((8,), torch.float32, "mpu")
    make_scopes()
    with scopes.enter("vision"):
        again = parallel_state.get_global_memory_buffer().get_tensor((8,), torch.float32, "mpu")
    assert mine.data_ptr() == again.data_ptr()
    assert isinstance(get_cuda_rng_tracker(), threading.local)


@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("inplace", [False, True])
def test_a_lanes_dropout_is_torchs_to_the_bit(p, inplace) -> None:
    torch.manual_seed(3)
    state, x = torch.get_rng_state(), torch.randn(33, 7)
    expected = torch.nn.functional.dropout(x.clone(), p, True, inplace)
    torch.set_rng_state(state)
    torch.randn(33, 7)
    after = torch.get_rng_state()
    with lane_random.own_generator():
        torch.set_rng_state(after)
        got = torch.nn.functional.dropout(x.clone(), p, True, inplace)
        assert torch.equal(torch.nn.functional.dropout(x, p, False), x)
    assert torch.equal(got, expected)


@pytest.mark.parametrize(
    "draw",
    [
        lambda: torch.rand(5),
        lambda: torch.randn(5),
        lambda: torch.randint(9, (5,)),
        lambda: torch.randperm(5),
        lambda: torch.bernoulli(torch.full((5,), 0.5)),
        lambda: torch.multinomial(torch.ones(5), 3),
        lambda: torch.normal(torch.zeros(5), 1.0),
        lambda: torch.empty(5).uniform_(),
        lambda: torch.nn.init.normal_(torch.empty(5)),
        lambda: torch.empty(5).exponential_(),
    ],
)
def test_every_draw_with_a_generator_is_the_threads_own(draw) -> None:
    torch.manual_seed(5)
    state = torch.get_rng_state()
    expected = draw()
    outer = torch.get_rng_state()
    with lane_random.own_generator(), lane_random.no_shared_draws():
        torch.set_rng_state(state)
        assert torch.equal(draw(), expected)
    assert torch.equal(torch.get_rng_state(), outer), "the process's stream moved"


def test_a_draw_that_takes_no_generator_is_found() -> None:
    with pytest.raises(RankFailure, match="process's own CPU generator"), lane_random.no_shared_draws():
        run_beside(lambda: torch.nn.functional.alpha_dropout(torch.ones(5), 0.5, True))


class NoLock:
    """Lets everybody in."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, *exc: object) -> None:
        pass


def meet_or_go_on(barrier: threading.Barrier) -> None:
    """Meet the other thread here, unless a lock keeps it away."""
    with contextlib.suppress(threading.BrokenBarrierError):
        barrier.wait()


@pytest.fixture
def channel(monkeypatch):
    """A channel with one spare buffer; whoever has chosen it waits for the other to choose, too."""
    monkeypatch.setattr("torch.distributed.get_rank", lambda *args: 0)
    made = RowChannel((None, None), width=2, dtype=torch.float32, device=torch.device("cpu"))
    made._give(torch.empty(3, 2))
    barrier = threading.Barrier(2, timeout=0.2)

    def choose(*args, **kwargs):
        chosen = min(*args, **kwargs)
        meet_or_go_on(barrier)
        return chosen

    monkeypatch.setattr(row_channel, "min", choose, raising=False)
    return made


def taken_beside(channel: RowChannel) -> set[int]:
    """The addresses of two buffers that two threads take at once."""
    taken: list[torch.Tensor] = []
    run_beside(*[lambda: taken.append(channel._take(3))] * 2)
    return {buffer.data_ptr() for buffer in taken}


def test_two_lanes_never_take_one_staging_buffer(channel) -> None:
    assert len(taken_beside(channel)) == 2


def test_without_the_lock_two_lanes_take_one_staging_buffer(channel, monkeypatch) -> None:
    monkeypatch.setattr(channel, "_lock", NoLock())
    with pytest.raises(IndexError):
        taken_beside(channel)


def routes_found_beside(cache: RouteCache) -> int:
    """How often two threads compute what both want."""
    barrier = threading.Barrier(2, timeout=0.2)
    run_beside(*[lambda: cache.find("key", lambda: meet_or_go_on(barrier))] * 2)
    return cache.misses


def test_a_route_is_computed_once(monkeypatch) -> None:
    assert routes_found_beside(RouteCache()) == 1
    open_to_all = RouteCache()
    monkeypatch.setattr(open_to_all, "_lock", NoLock())
    assert routes_found_beside(open_to_all) == 2


def test_a_batch_is_joined_once(monkeypatch) -> None:
    def joined(lock: object) -> int:
        barrier, calls = threading.Barrier(2, timeout=0.2), []

        def collate(samples):
            calls.append(samples)
            if len(samples) > 1:
                meet_or_go_on(barrier)
            return {}

        batches = Batches([[1], [2]], collate)
        if lock is not None:
            monkeypatch.setattr(batches, "_lock", lock)
        run_beside(*[lambda: batches.covering(range(2))] * 2)
        return calls.count([1, 2])

    assert (joined(None), joined(NoLock())) == (1, 2)


PLAN = make_plan({name: ("0-1", Layout(dp=2)) for name in NAMES}, world_size=2)
SUMS = {"vision": 1.0, "llm": 10.0}


def sum_in_other_orders(apart: tuple[str, ...], is_right: bool) -> None:
    """Each module sums over its dp group in a thread of its own; rank 1 begins with the other module."""
    rank = dist.get_rank()
    grids = Grids(RankView.of(PLAN, rank), timeout=timedelta(seconds=20), apart=apart)
    first_has_begun, found = threading.Event(), {}

    def body(module: str, is_first: bool) -> None:
        value = torch.full((4,), SUMS[module])
        if not is_first:
            first_has_begun.wait(10)
        work = dist.all_reduce(value, group=grids.collections[module].dp, async_op=True)
        first_has_begun.set()
        work.wait()
        found[module] = value.tolist()

    run_beside(*(lambda m=m, i=i: body(m, i == rank) for i, m in enumerate(NAMES)))
    assert (found == {name: [2 * value] * 4 for name, value in SUMS.items()}) is is_right, found


@pytest.mark.dist
@pytest.mark.parametrize(("apart", "is_right"), [(NAMES, True), ((), False)], ids=["apart", "shared: mixed up"])
def test_modules_that_run_beside_each_other_need_groups_of_their_own(apart, is_right) -> None:
    run_gloo(2, sum_in_other_orders, apart, is_right)
