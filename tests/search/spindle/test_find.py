"""Families of plans for tasks: legal, within memory, in the published order; placement; what a user sees of them."""

import json
from dataclasses import replace

import pytest
import yaml

from megatron_mosaic.cli.main import main
from megatron_mosaic.config import load_task
from megatron_mosaic.cost_model.model import CostModel, memory_limit_bytes
from megatron_mosaic.cost_model.waves.step import WaveClock
from megatron_mosaic.errors import ConfigError
from megatron_mosaic.plan import Recompute
from megatron_mosaic.plan.tasks.waves import validate_waves
from megatron_mosaic.search.greedy import NoFeasiblePlan
from megatron_mosaic.search.space import SearchConfig
from megatron_mosaic.search.spindle.families import FAMILIES, marginal_gain
from megatron_mosaic.search.spindle.find import find_waves, list_choices, price_waves
from megatron_mosaic.search.spindle.metaops import contract
from megatron_mosaic.search.spindle.placement import Placer, Rule
from megatron_mosaic.search.spindle.wavefront import STRATEGIES, schedule_levels
from tests.cases import make_cluster
from tests.search.spindle.ops import make_op
from tests.task_cases import TASKS

MODEL = CostModel(TASKS, make_cluster(4, flops_per_s=1e10))
CLIP = ["model=multitask_clip_10", "cluster=a800_8x8", "cluster.num_nodes=2"]


def test_every_family_has_a_legal_plan_of_a_small_workload():
    result = find_waves(MODEL, SearchConfig())
    for name, found in result.families.items():
        assert found is not None, name
        validate_waves(found.plan, TASKS)
        assert found.step.peak_bytes <= memory_limit_bytes(MODEL.cluster, 0.9)
    name, best = result.best
    assert best.step.step_s == min(found.step.step_s for found in result.families.values())
    assert best.plan.predicted.step_s == best.step.step_s


def test_families_rank_as_published_on_ten_tasks():
    """CLIP-10 on 16 GPUs in the paper, over DeepSpeed: Spindle 1.33, DistMM-MT 1.08, Megatron 1.02, Optimus 0.93."""
    task = load_task(CLIP)
    step_s = {name: found.step.step_s for name, found in find_waves(task.cost_model(), task.search).families.items()}
    assert step_s["spindle"] < step_s["tasks_in_turn"] < step_s["modules_in_turn"]
    assert step_s["marginal_gain"] > step_s["tasks_in_turn"]
    assert 1.2 < step_s["modules_in_turn"] / step_s["spindle"] < 1.6


def _placer(words, memory_bytes=None):
    task = load_task(words)
    clock = WaveClock(task.cost_model())
    limit_bytes = memory_limit_bytes(task.cluster, task.search.memory_frac)
    choice = next(list_choices(clock, task.search, limit_bytes))
    found = contract(clock.model, clock.uses, choice, limit_bytes)
    placer = Placer(
        clock=clock,
        recompute=Recompute.none,
        memory_bytes=memory_bytes or limit_bytes,
        num_ranks=task.cluster.num_ranks,
        gpus_per_node=task.cluster.gpus_per_node,
    )
    return placer, schedule_levels(found, placer.num_ranks, STRATEGIES[0]), choice


def test_islands_move_less_than_ranks_in_turn():
    placer, levels, choice = _placer(CLIP)
    smart, plain = (
        price_waves(placer.clock, placer.place(levels.waves, rule), levels.best_s, choice).step
        for rule in (Rule.islands, Rule.in_turn)
    )
    assert smart.moved_bytes < 0.6 * plain.moved_bytes
    assert smart.transfer_frac < plain.transfer_frac
    assert smart.busy_s == pytest.approx(plain.busy_s)  # the same slices


def test_placement_gives_way_to_memory():
    """Waves stay where they are near the peak of the clock (optimizers are split over slices here, and over all of a
    module's ranks there). Then a limit that islands overflow and that ranks with most free memory keep; and one that
    nothing keeps."""
    placer, levels, choice = _placer(["model=ofasys", "cluster=a800_8x8", "cluster.num_nodes=2"])
    free = placer.place(levels.waves, Rule.islands)
    islands = price_waves(placer.clock, free, 1.0, choice).step.peak_bytes
    assert replace(placer, memory_bytes=1.05 * islands).place(levels.waves, Rule.islands) == free
    limit_bytes = 0.97 * islands
    tight = replace(placer, memory_bytes=limit_bytes).place(levels.waves, Rule.islands)
    assert tight is not None
    assert price_waves(placer.clock, tight, 1.0, choice).step.peak_bytes <= limit_bytes
    assert replace(placer, memory_bytes=islands / 2).place(levels.waves, Rule.islands) is None


def test_marginal_gain_takes_the_steepest_first():
    """Two tasks, 4 devices: a gains 6 s by its second device and nothing more, b 2 s and then 1 s each."""
    a = make_op("caption", 1, {1: 8.0, 2: 2.0})
    b = make_op("pairs", 1, {1: 4.0, 2: 2.0})
    placer = Placer(clock=WaveClock(MODEL), recompute=Recompute.none, memory_bytes=1e12, num_ranks=3, gpus_per_node=4)
    (waves,) = marginal_gain([replace(a, module="vision"), replace(b, module="text")], placer)
    assert [(each.task, str(each.ranks)) for each in waves[0]] == [("caption", "0-1"), ("pairs", "2")]
    (waves,) = marginal_gain([replace(a, module="vision"), replace(b, module="text")], replace(placer, num_ranks=1))
    assert [[each.task for each in wave] for wave in waves] == [["caption"], ["pairs"]]


def test_marginal_gain_needs_devices_for_whole_groups_of_tp():
    """Five devices of tp 1 are eight, in groups of four: there are six."""
    wide, long = make_op("caption", 1, {4: 9.0}, tp=4), make_op("caption", 1, {5: 1.0})
    placer = Placer(clock=WaveClock(MODEL), recompute=Recompute.none, memory_bytes=1e12, num_ranks=6, gpus_per_node=6)
    assert list(marginal_gain([replace(wide, module="vision"), replace(long, module="text")], placer)) == [None]


def test_marginal_gain_begins_groups_of_tp_at_multiples_of_it():
    """A task that needs three devices of tp 1 stands behind one of tp 2."""
    a, b = make_op("caption", 1, {3: 9.0}), make_op("pairs", 1, {2: 1.0}, tp=2)
    placer = Placer(clock=WaveClock(MODEL), recompute=Recompute.none, memory_bytes=1e12, num_ranks=8, gpus_per_node=8)
    (waves,) = marginal_gain([replace(a, module="vision"), replace(b, module="text")], placer)
    assert {each.task: str(each.ranks) for each in waves[0]} == {"pairs": "0-1", "caption": "2-4"}


@pytest.mark.parametrize(("num_nodes", "batch"), [(1, 36), (2, 144)])
def test_parts_that_stay_leave_room_for_groups_of_tp(num_nodes, batch):
    """An odd dp at tp 1 beside a module of tp 2, on an odd number of ranks that it would keep."""
    words = ["model=qwen_val", "cluster=a800_8x8", f"cluster.num_nodes={num_nodes}"]
    task = load_task([*words, f"workload.global_batch_size={batch}"])
    validate_waves(find_waves(task.cost_model(), task.search).best[1].plan, task.workload)


def test_what_does_not_fit_is_said():
    small = make_cluster(4)
    small = replace(small, gpu=replace(small.gpu, memory_bytes=2e6))
    with pytest.raises(NoFeasiblePlan, match="global_batch_size"):
        find_waves(CostModel(TASKS, small), SearchConfig())


@pytest.mark.parametrize("words", [["search.algorithm=exhaustive"], ["search.pin.image.layout.tp=2"]])
def test_what_the_search_does_not_follow_is_refused(words):
    task = load_task([*CLIP, *words])
    with pytest.raises(ConfigError, match="search"):
        find_waves(task.cost_model(), task.search)


def test_from_the_command_line(tmp_path, capsys):
    plan = tmp_path / "plan.yaml"
    words = ["model=multitask_clip_4", "cluster=a800_8x8", "cluster.num_nodes=1"]
    assert main(["plan", *words, "--out", str(plan), "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert yaml.safe_load(plan.read_text()) == planned["plan"]
    assert planned["family"] == "spindle"
    assert main(["compare", *words, "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)["rows"]}
    assert list(rows) == list(FAMILIES)
    assert rows["spindle"]["step_s"] == planned["predicted"]["step_s"]
    assert rows["modules_in_turn"]["speedup"] == 1
    assert main(["simulate", str(plan), "--json"]) == 0
    simulated = json.loads(capsys.readouterr().out)
    assert simulated["step_s"] == planned["predicted"]["step_s"]
    assert main(["show", str(plan), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert [task["task"] for task in shown["tasks"]] == ["image_audio", "image_thermal", "text_depth", "text_imu"]
    assert max(shown["peak_bytes"].values()) == simulated["peak_bytes"]
    assert main(["show", str(plan)]) == 0
    assert "wave  0 | ranks" in capsys.readouterr().out
    assert main(["simulate", str(plan), "workload.training.sharding=optimizer"]) == 0
    assert "transfers" in capsys.readouterr().out
    for command in ("check", "train", "report"):
        assert main([command, str(plan)]) == 2
        assert "a plan in waves, for several tasks" in capsys.readouterr().err
    assert main(["simulate", str(plan), "--html", str(tmp_path / "x.html")]) == 2
    plan.write_text(plan.read_text().replace("layers: 0-", "layers: 1-", 1))
    assert main(["show", str(plan)]) == 2
    assert "wave 0" in capsys.readouterr().err
