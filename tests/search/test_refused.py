"""No plan fits: who came nearest, and words that help, found by search."""

import json
import math
from dataclasses import replace

import pytest

from megatron_mosaic.cli.main import main
from megatron_mosaic.cost_model.model import CostModel
from megatron_mosaic.cost_model.simulate import simulate
from megatron_mosaic.search.evaluate import Evaluator
from megatron_mosaic.search.exhaustive import every_plan, search_exhaustive
from megatron_mosaic.search.greedy import NoFeasiblePlan, search_greedy
from megatron_mosaic.search.pins import Pins
from megatron_mosaic.search.refused.remedies import find_remedy, list_remedies
from megatron_mosaic.search.space import SearchConfig, Space
from tests.search.test_quality import FIRST_SEED, random_instance


def refused(space: Space) -> tuple[NoFeasiblePlan, CostModel]:
    model = CostModel(space.workload, space.cluster)
    with pytest.raises(NoFeasiblePlan) as caught:
        list(search_greedy(space, Evaluator(model=model, memory_frac=space.config.memory_frac)))
    return caught.value, model


def too_small(seed: int) -> Space:
    """A device that holds a little less than any plan of the space needs at least."""
    instance = random_instance(FIRST_SEED + seed, 300)
    least = min(instance.model.price(plan).lower_bound_bytes for plan in every_plan(instance.space))
    gpu = replace(instance.space.cluster.gpu, memory_bytes=0.99 * least / instance.space.config.memory_frac)
    return replace(instance.space, cluster=replace(instance.space.cluster, gpu=gpu))


@pytest.mark.parametrize("seed", range(4))
def test_the_nearest_miss_is_a_plan_and_its_parts_add_up(seed):
    space = too_small(seed)
    none, model = refused(space)
    assert search_exhaustive(space, Evaluator(model=model, memory_frac=space.config.memory_frac)) is None
    simulation = simulate(none.miss.plan, model)
    assert none.miss.num_bytes == simulation.peak_bytes > 0.9 * space.cluster.gpu.memory_bytes
    [memory] = [each for ranks, each in simulation.memory().items() if ranks == none.miss.ranks]
    assert sum(none.miss.by_module.values()) == pytest.approx(memory.total - memory.workspace)
    states = memory.parameters + memory.gradients + memory.optimizer
    assert states * (1 - 1e-9) <= none.miss.always_bytes <= (states + memory.buffers) * (1 + 1e-9)
    assert str(none.miss.ranks) in none.got and next(iter(none.miss.by_module)) in none.got


def test_other_plans_come_before_other_jobs_and_the_fastest_wins():
    space = random_instance(0, 300).space
    config = SearchConfig(
        max_tp=1, pin=Pins.model_validate({"llm": {"layout": {"tp": 1, "pp": 1}, "recompute": "none"}})
    )
    space = replace(space, config=config)
    none, _ = refused(too_small(0))
    levels = list(list_remedies(space, fewer_samples=True))
    assert levels[0] == [
        (f"search.max_tp={space.cluster.gpus_per_node}",),
        ("search.pin.llm.recompute=null",),
        ("search.pin.llm.layout.tp=null", "search.pin.llm.layout.pp=null"),
    ]
    asked = []

    def answer(seconds):
        def step_s(words):
            asked.append(words)
            return seconds.get(words, math.inf)

        return step_s

    two = {levels[0][0]: 3.0, levels[0][1]: 2.0}
    miss = replace(none.miss, always_bytes=0.0)
    assert find_remedy(space, miss, 1.0, answer(two)).words == levels[0][1]
    assert asked == levels[0]
    batch = space.workload.global_batch_size
    fewer = (f"workload.global_batch_size={batch // 2}",)
    assert find_remedy(space, miss, 1.0, answer({fewer: 1.0, levels[-1][0]: 0.1})).words == fewer
    assert find_remedy(space, miss, 1.0, answer({})) is None
    parameters = replace(miss, always_bytes=2.0)  # alone are too many: fewer samples are no remedy
    assert find_remedy(space, parameters, 1.0, answer({fewer: 1.0, levels[-1][0]: 9.0})).words == levels[-1][0]


def test_the_words_of_the_answer_help(capsys):
    """As a user would: the command says no and which words to add; with them it says yes."""
    words = ["plan", "model=vlm_7b", "cluster=h100_1x8", "workload.global_batch_size=8", "search.max_pp=1"]
    words += ["search.pin.llm.layout.tp=1", "search.pin.schedule=1f1b", "--json"]
    assert main(words) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["nearest"]["module"] == "llm" and report["nearest"]["bytes"] > 72e9
    assert report["fix"].startswith("add " + " ".join(report["remedy"]["words"]))
    assert main([*words, *report["remedy"]["words"]]) == 0
    assert json.loads(capsys.readouterr().out)["fits"]
