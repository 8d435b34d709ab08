"""Side by side or in turns: the search shares cores where the calibration says that it gains, and nowhere else."""

from dataclasses import replace
from math import inf

import pytest

from megatron_mosaic.cost_model.hardware.catalogue import local_cluster
from megatron_mosaic.cost_model.hardware.profile import InterferenceFit, Profile
from megatron_mosaic.cost_model.model import CostModel
from megatron_mosaic.cost_model.simulate import simulate
from megatron_mosaic.plan import Layout, Plan, Quota, ScheduleChoice
from megatron_mosaic.plan.plan import CONCURRENT
from megatron_mosaic.plan.workload import Workload
from megatron_mosaic.schedules import Kind
from megatron_mosaic.search.find import find_plan
from megatron_mosaic.search.space import SearchConfig
from tests.cases import EDGES, LLM, VISION, make_plan, make_profile

PAIR = Workload(name="pair", modules=(VISION, LLM), edges=EDGES[:1], global_batch_size=32)


def profile_of(second_thread: float, residual: float, serial_frac: float) -> Profile:
    """Two cores: with two threads a module takes `second_thread` of its time with one. Layers launch for 4 ms; together
    the two modules move more than the memory can."""
    data = make_profile(PAIR).model_dump()
    for module in data["modules"].values():
        for threads in module.values():
            for point, alone in zip(threads[2], threads[1], strict=True):
                point |= {key: second_thread * alone[key] for key in ("forward_s", "backward_s")}
    data["machine"]["memory_bytes_per_s"] = 7e8
    fit = {"residual": residual, "serial_frac": serial_frac, "cache_bytes": 0.0, "layer_host_s": 4e-3}
    fit |= {"num_pairs": 3, "error_frac": 0.0, "held_out_error_frac": 0.0}
    return Profile.model_validate(data | {"interference": InterferenceFit.model_validate(fit)})


def model_of(profile: Profile) -> CostModel:
    return CostModel(PAIR, local_cluster(profile, 1), profile)


IN_TURNS = make_plan(dict.fromkeys(("vision", "llm"), ("0", Layout())), workload=PAIR, world_size=1,
                     global_batch_size=32)  # fmt: skip
BESIDE = replace(
    IN_TURNS,
    schedule=ScheduleChoice("overlap"),
    modules={name: replace(m, quota=Quota(share=0.5)) for name, m in IN_TURNS.modules.items()},
)


def gain_of_the_pair(model: CostModel) -> float:
    """Of a unit of each, forwards and backwards: what the calibration says of two modules, without any schedule."""
    turns, beside = model.price(IN_TURNS), model.price(BESIDE)
    in_turns_s = [sum(cost.action_s.values()) for cost in turns.costs]
    lanes = [
        replace(
            beside.runner(lane, Kind.F),
            alone_s=sum(beside.runner(lane, kind).alone_s for kind in (Kind.F, Kind.B)),
            moved_bytes=sum(beside.runner(lane, kind).moved_bytes for kind in (Kind.F, Kind.B)),
            host_s=sum(beside.runner(lane, kind).host_s for kind in (Kind.F, Kind.B)),
        )
        for lane in (0, 1)
    ]
    return beside.source.interference.gain_beside(in_turns_s, lanes)


CASES = [(0.95, 0.0, 0.0), (0.95, 3.0, 0.0), (0.95, 0.0, 1.0), (0.8, 0.0, 0.0), (0.8, 1.5, 0.5), (0.6, 0.0, 0.0),
         (0.7, 0.5, 0.0), (0.9, 1.0, 0.0), (0.95, 0.5, 0.5)]  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_the_simulator_gains_where_the_pair_does(case):
    model = model_of(profile_of(*case))
    gain = gain_of_the_pair(model)
    whole_s = [simulate(replace(IN_TURNS, schedule=ScheduleChoice(name)), model).step_s for name in ("1f1b", "nested")]
    simulated = min(whole_s) / simulate(BESIDE, model).step_s
    assert simulated == pytest.approx(gain, rel=0.05)  # a step fills and drains, and ends with what no track has


def test_there_are_pairs_of_both_kinds():
    gains = [gain_of_the_pair(model_of(profile_of(*case))) for case in CASES]
    assert min(gains) < 0.9 and max(gains) > 1.1


@pytest.mark.parametrize("case", CASES)
def test_the_search_shares_cores_only_where_it_gains(case):
    model = model_of(profile_of(*case))
    gain = gain_of_the_pair(model)
    assert abs(gain - 1) > 0.01, "a pair whose gain says nothing"
    found = find_plan(model, SearchConfig(max_micro_batch_size=1)).plan
    assert is_shared(found) is (gain > 1)
    assert simulate(found, model).step_s <= min(simulate(plan, model).step_s for plan in (IN_TURNS, BESIDE))


def test_a_search_that_does_not_ask_for_interference_chooses_wrongly(monkeypatch):
    case = CASES[1]
    blind = model_of(profile_of(*case).model_copy(update={"interference": None}))
    blind.source.interference = replace(blind.source.interference, bandwidth_bytes_per_s=inf)
    found = find_plan(blind, SearchConfig(max_micro_batch_size=1)).plan
    assert is_shared(found)
    assert simulate(found, model_of(profile_of(*case))).step_s > simulate(IN_TURNS, model_of(profile_of(*case))).step_s


def is_shared(plan: Plan) -> bool:
    """Whether modules run beside each other."""
    return plan.schedule.name in CONCURRENT and bool(plan.tracks("llm"))
