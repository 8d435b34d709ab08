"""A step in waves, against sums and maxima written down by hand from the prices of single slices and collectives."""

from dataclasses import replace

import pytest

from megatron_mosaic.cost_model.effects.comm import RingComm
from megatron_mosaic.cost_model.effects.counts import module_parameters
from megatron_mosaic.cost_model.effects.parameters import stage_parameters
from megatron_mosaic.cost_model.groups import Group
from megatron_mosaic.cost_model.hardware.profile import Operation
from megatron_mosaic.cost_model.model import CostModel
from megatron_mosaic.cost_model.waves.slices import list_pools, list_uses
from megatron_mosaic.cost_model.waves.step import WaveClock
from megatron_mosaic.errors import ConfigError
from megatron_mosaic.plan import RankSet
from megatron_mosaic.plan.tasks.waves import WavePlan
from megatron_mosaic.schedules import Kind
from tests.cases import make_cluster
from tests.task_cases import TASKS, TWO_WAVES, cut, slice_of


def _clock(gpus_per_node: int = 6) -> WaveClock:
    return WaveClock(CostModel(TASKS, make_cluster(6, gpus_per_node=gpus_per_node)))


def _plan(*waves) -> WavePlan:
    return replace(TWO_WAVES, waves=waves)


def _f(clock, each):
    return clock.cost(each).seconds(Kind.F)


def _b(clock, each):
    return clock.cost(each).seconds(Kind.B)


def test_a_chain_and_what_runs_beside_it():
    clock = _clock()
    (vision, paired, text), (llm,) = TWO_WAVES.waves
    step = clock.simulate(TWO_WAVES)
    assert step.forward_s == pytest.approx(max(_f(clock, vision) + _f(clock, llm), _f(clock, paired), _f(clock, text)))
    assert step.backward_s == pytest.approx(max(_b(clock, vision) + _b(clock, llm), _b(clock, paired), _b(clock, text)))
    busy_s = sum(len(s.ranks) * (_f(clock, s) + _b(clock, s)) for s in TWO_WAVES.slices)
    assert step.busy_s == pytest.approx(busy_s)
    assert step.exposed_transfer_s == 0  # captions stay on their ranks, in the same slots
    assert step.step_s == pytest.approx(step.forward_s + step.backward_s + step.gradients_s)


def test_rows_that_move_take_their_time_both_ways():
    clock = _clock()
    first, (llm,) = TWO_WAVES.waves
    step = clock.simulate(_plan(first, (replace(llm, ranks=RankSet.parse("4-5")),)))
    # 6 samples of 16 rows of 64 values in bf16, half of them from each rank to one other: one message each
    link = make_cluster(6).intra
    seconds = link.latency_s + 3 * 16 * 64 * 2 / link.bytes_per_s
    assert step.exposed_transfer_s == pytest.approx(2 * seconds)
    assert step.moved_bytes == 6 * 16 * 64 * 2
    across = _clock(gpus_per_node=2).simulate(_plan(first, (replace(llm, ranks=RankSet.parse("4-5")),)))
    slow = make_cluster(6, gpus_per_node=2).inter
    assert across.exposed_transfer_s == pytest.approx(2 * (slow.latency_s + 3 * 16 * 64 * 2 / slow.bytes_per_s))


def test_hidden_states_move_where_a_module_goes_on_elsewhere():
    clock = _clock()
    (vision, paired, text), (llm,) = TWO_WAVES.waves
    rest = replace(cut(paired, 2, 2), ranks=RankSet.parse("5"))
    split = _plan((vision, cut(paired, 0, 2), text), (rest, llm))
    alone = _plan((cut(paired, 0, 2),), (rest,))
    link = make_cluster(6).intra
    # pairs: 4 samples of 2 items of 16 tokens of 64 values
    moved_s = link.latency_s + 4 * 2 * 16 * 64 * 2 / link.bytes_per_s
    step = clock.simulate(alone)
    assert step.forward_s == pytest.approx(_f(clock, cut(paired, 0, 2)) + moved_s + _f(clock, rest))
    assert clock.simulate(split).forward_s == pytest.approx(max(step.forward_s, _f(clock, vision) + _f(clock, llm)))


def test_gradients_are_summed_over_every_rank_that_ran_a_layer():
    clock = _clock()
    pools = {(pool.module, str(pool.ranks)): pool for pool in list_pools(TWO_WAVES.slices, TASKS, 6)}
    assert set(pools) == {("vision", "0-2"), ("text", "3"), ("llm", "0-1")}
    comm = RingComm(make_cluster(6))
    sizes = {name: module_parameters(TASKS.by_name[name]) for name in ("vision", "llm")}
    assert stage_parameters(pools["vision", "0-2"].work) == sizes["vision"]
    expected = sum(
        comm.estimate(Operation.all_reduce, Group.on_one_node(count), 4 * sizes[name])
        for name, count in (("vision", 3), ("llm", 2))
    )  # ranks 0 and 1 have both
    source = clock.model.source
    optimizer_s = source.optimizer_s(sum(sizes.values()))
    tail_s = expected + optimizer_s + source.consensus_s(Group.on_one_node(6))
    assert clock.simulate(TWO_WAVES).gradients_s == pytest.approx(tail_s)


def test_layers_on_other_ranks_are_pools_of_their_own():
    (vision, paired, text), (llm,) = TWO_WAVES.waves
    rest = replace(cut(paired, 2, 2), ranks=RankSet.parse("5"))
    pools = list_pools(_plan((vision, cut(paired, 0, 2), text), (rest, llm)).slices, TASKS, 6)
    found = {(pool.layers, str(pool.ranks)) for pool in pools if pool.module == "vision"}
    assert found == {((0, 1), "0-2"), ((2, 3), "0-1,5")}
    assert sum(stage_parameters(pool.work) for pool in pools) == sum(map(module_parameters, TASKS.modules))


def test_memory_is_all_parameters_once_and_all_activations():
    clock = _clock()
    step = clock.simulate(TWO_WAVES)
    (vision, _, _), (llm,) = TWO_WAVES.waves
    size = module_parameters(TASKS.by_name["vision"]) + module_parameters(TASKS.by_name["llm"])
    held = step.memory[0]
    assert held.parameters + held.gradients + held.optimizer == pytest.approx(18 * size)
    units = [clock.cost(each).memory.unit for each in (vision, llm)]
    assert held.activations == pytest.approx(sum(unit.activations for unit in units))
    assert 4 not in step.memory  # rank 4 has nothing


def test_only_a_next_token_loss_makes_logits():
    uses = list_uses(TASKS)
    assert uses["pairs", "text"].module.vocab_size == 0
    assert uses["caption", "llm"].module.vocab_size == 128
    assert uses["pairs", "vision"].items == 8


def test_a_frozen_module_without_anything_behind_has_no_backward():
    frozen = replace(TASKS, modules=(replace(TASKS.modules[0], frozen=True), *TASKS.modules[1:]))
    uses = list_uses(frozen)
    assert uses["caption", "vision"].kinds == (Kind.F,)
    assert uses["caption", "llm"].kinds == (Kind.F, Kind.B)


def test_a_frozen_slice_gets_no_gradients_and_keeps_nothing():
    frozen = replace(TASKS, modules=(replace(TASKS.modules[0], frozen=True), *TASKS.modules[1:]))
    clock = WaveClock(CostModel(frozen, make_cluster(6)))
    (vision, _, _), (llm,) = TWO_WAVES.waves
    step = clock.simulate(_plan((vision,), (replace(llm, ranks=RankSet.parse("4-5")),)))
    assert step.exposed_transfer_s > 0
    assert step.backward_s == pytest.approx(_b(clock, llm))
    assert _b(clock, vision) == 0
    before, behind = (clock.simulate(plan).memory[0] for plan in (_plan((vision,)), TWO_WAVES))
    passing, kept = (clock.cost(each).memory.unit for each in (vision, llm))
    assert passing.activations > 0 and kept.activations > 0
    assert before.activations == passing.activations  # while it works
    assert behind.activations == max(passing.activations, kept.activations)  # never both


def test_experts_are_refused():
    sparse = replace(TASKS, modules=(*TASKS.modules[:2], replace(TASKS.modules[2], num_experts=4)))
    with pytest.raises(ConfigError, match="module 'llm'"):
        list_uses(sparse)


def test_one_slice_alone_is_its_own_time():
    clock = _clock()
    each = slice_of("pairs", "text", "0")
    step = clock.simulate(_plan((each,)))
    assert (step.forward_s, step.backward_s) == (_f(clock, each), _b(clock, each))
