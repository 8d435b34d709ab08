"""Tracks of one rank slow each other down as in the oracle, where every rank is a process; what they hold adds up."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_mosaic.cost_model.clock.machine import Beside, SharedCores
from megatron_mosaic.cost_model.effects.compute import granted_sms
from megatron_mosaic.cost_model.effects.interference import CoRunner, Interference
from megatron_mosaic.cost_model.hardware.catalogue import local_cluster
from megatron_mosaic.cost_model.hardware.profile import InterferenceFit
from megatron_mosaic.cost_model.model import CostModel
from megatron_mosaic.cost_model.simulate import Simulation, simulate
from megatron_mosaic.plan import Layout, Plan, Quota, ScheduleChoice
from megatron_mosaic.schedules import build_schedule
from tests.cases import WORKLOAD, make_cluster, make_plan, make_profile
from tests.cost_model.oracle_events import assert_as_in_the_oracle
from tests.cost_model.test_clock import plans_with_tracks

HUNGRY = InterferenceFit(
    residual=0.7,
    serial_frac=0.8,
    cache_bytes=5e4,
    layer_host_s=1e-3,
    num_pairs=3,
    error_frac=0.0,
    held_out_error_frac=0,
)


def gpu_model(residual: float = 0.7, num_ranks: int = 4) -> CostModel:
    """Little bandwidth: every kernel waits for memory."""
    cluster = make_cluster(num_ranks)
    gpu = replace(cluster.gpu, memory_bytes_per_s=2e9, interference_residual=residual)
    return CostModel(WORKLOAD, replace(cluster, gpu=gpu))


def local_model(cores: int, num_ranks: int = 4, fit: InterferenceFit | None = HUNGRY) -> CostModel:
    made = make_profile(WORKLOAD, cores=cores)
    machine = made.machine.model_copy(update={"memory_bytes_per_s": 1e9 * num_ranks})
    profile = made.model_copy(update={"interference": fit, "machine": machine})
    return CostModel(WORKLOAD, local_cluster(profile, num_ranks), profile)


def beside(plan: Plan, **shares: float) -> Plan:
    modules = {name: replace(m, quota=Quota(share=shares.get(name, 1.0))) for name, m in plan.modules.items()}
    return replace(plan, modules=modules, schedule=ScheduleChoice("overlap"))


ONE_RANK = make_plan({name: ("0", Layout()) for name in ("vision", "llm", "generator")}, world_size=1)
EVEN = beside(ONE_RANK, vision=0.5, llm=0.5)


def slowed_s(simulation: Simulation) -> float:
    """Seconds that actions took longer than alone."""
    program, costs = simulation.program, simulation.price.costs
    alone = [costs[lane].seconds(kind) for lane, kind in program.jobs]
    rows = zip(simulation.start_s, simulation.end_s, program.job)
    return sum(end - start - alone[job] for start, end, job in rows)


@settings(max_examples=40)
@given(plans_with_tracks(), st.sampled_from([0.0, 0.7]))
def test_on_gpus_as_in_the_oracle(case, residual):
    plan, schedule = case
    assert_as_in_the_oracle(simulate(plan, gpu_model(residual), schedule), plan)


@settings(max_examples=25)
@given(plans_with_tracks(), st.integers(1, 3), st.sampled_from([None, HUNGRY]))
def test_on_shared_cores_as_in_the_oracle(case, cores, fit):
    plan, schedule = case
    assert_as_in_the_oracle(simulate(plan, local_model(cores, fit=fit), schedule), plan, cores=cores)


@pytest.mark.slow
@settings(max_examples=1000, deadline=None)
@given(plans_with_tracks(), st.integers(0, 3))
def test_a_thousand_plans_are_as_in_the_oracle(case, cores):
    plan, schedule = case
    model = local_model(cores) if cores else gpu_model()
    assert_as_in_the_oracle(simulate(plan, model, schedule), plan, cores=cores)


@pytest.mark.parametrize("wrong", ["no residual", "at full speed", "of another job"])
def test_a_clock_that_slows_lanes_down_wrongly_is_found(wrong, monkeypatch):
    rates = Beside.rates

    def wrong_rates(self, slots, jobs):
        if wrong == "no residual":
            self = replace(self, interference=replace(self.interference, residual=0.0), _known={})
        return rates(self, slots, [0] * len(jobs) if wrong == "of another job" else jobs)

    monkeypatch.setattr(Beside, "rates", wrong_rates if wrong != "at full speed" else lambda self, s, j: [1.0] * len(s))
    simulation = simulate(EVEN, gpu_model(num_ranks=1))
    with pytest.raises(AssertionError):
        assert_as_in_the_oracle(simulation, EVEN)


@pytest.mark.parametrize("model", [gpu_model(num_ranks=1), local_model(2, num_ranks=1)], ids=["gpu", "cpu"])
def test_lanes_beside_each_other_take_longer_than_alone(model):
    turns = simulate(replace(EVEN, schedule=ScheduleChoice("nested")), model)
    assert slowed_s(turns) == pytest.approx(0)
    assert slowed_s(simulate(EVEN, model)) > 0.02 * turns.step_s


def test_what_crowded_ranks_and_what_tracks_cost_is_not_counted_twice():
    hungry = (CoRunner(alone_s=1, moved_bytes=100), CoRunner(alone_s=1, moved_bytes=100))

    def rates(crowded: float, bandwidth: float) -> list[float]:
        alone = SharedCores(cores=2, threads=(1, 1), slow_downs=((2, crowded),))
        shared = Interference(bandwidth_bytes_per_s=bandwidth)
        return Beside(alone=alone, devices=((0,), (0,)), runners=hungry, interference=shared).rates([0, 1], [0, 1])

    assert rates(1.3, 125) == pytest.approx([1 / 1.6] * 2)  # 62.5 of 100 each
    assert rates(1.7, 125) == pytest.approx([1 / 1.7] * 2)
    assert rates(1.0, 200) == [1, 1]


def test_memory_that_nobody_lacks_slows_nobody_down():
    model = local_model(2, num_ranks=1, fit=HUNGRY.model_copy(update={"cache_bytes": 1e9, "serial_frac": 0.0}))
    assert slowed_s(simulate(EVEN, model)) == pytest.approx(0)


def test_a_prediction_says_whether_its_interference_was_measured():
    assert simulate(ONE_RANK, local_model(2, num_ranks=1)).interference == ""
    assert simulate(EVEN, local_model(2, num_ranks=1)).interference == "calibrated"
    assert simulate(EVEN, local_model(2, num_ranks=1, fit=None)).interference == "not calibrated"
    gpus = make_cluster(1)
    measured = replace(gpus.gpu, sources={**gpus.gpu.sources, "interference_residual": "a bench"})
    assert simulate(EVEN, CostModel(WORKLOAD, gpus)).interference == "not calibrated"
    assert simulate(EVEN, CostModel(WORKLOAD, replace(gpus, gpu=measured))).interference == "calibrated"


def test_lanes_get_what_a_run_grants_them_jointly():
    simulation = simulate(EVEN, local_model(2, num_ranks=1))
    assert [cost.threads for cost in simulation.price.costs] == [1, 1, 1]  # the generator has its track's core
    assert [cost.threads for cost in local_model(3, num_ranks=1).price(EVEN).costs] == [2, 1, 1]
    works = [lane.work for lane in simulation.price.work.lanes]
    assert [granted_sms(work, make_cluster(1).gpu) for work in works] == [68, 64, 64]
    crowded = beside(ONE_RANK, vision=0.3, llm=0.4, generator=0.3)
    assert [cost.threads for cost in local_model(2, num_ranks=1).price(crowded).costs] == [1, 1, 1]


def test_what_tracks_hold_adds_up():
    model = gpu_model(num_ranks=1)
    turns = simulate(replace(EVEN, schedule=ScheduleChoice("overlap"), modules=ONE_RANK.modules), model)
    tracks = simulate(EVEN, model)
    lanes = {lane.name: cost.memory for lane, cost in zip(tracks.price.work.lanes, tracks.price.costs, strict=True)}
    live = build_schedule(EVEN, WORKLOAD).work.live_units
    units = {name: live(name) * memory.unit_bytes for name, memory in lanes.items()}
    static = sum(memory.static_bytes for memory in lanes.values())
    workspace = lanes["vision.0"].workspace_bytes + max(
        lanes[name].workspace_bytes for name in ("llm.0", "generator.0")
    )
    # vision's own peak, beside the worst moment of the two that take turns
    assert tracks.peak_bytes <= static + workspace + sum(units.values())
    assert tracks.peak_bytes >= static + workspace + units["vision.0"] + max(units["llm.0"], units["generator.0"])
    assert tracks.peak_bytes > turns.peak_bytes
    assert sum(held.total for held in tracks.memory().values()) == pytest.approx(tracks.peak_bytes)
