"""A module's priced rows against the stages of a plan, one by one."""

from dataclasses import replace

import numpy as np
import pytest

from megatron_mosaic.cost_model.effects.memory import stage_memory
from megatron_mosaic.cost_model.model import CostModel
from megatron_mosaic.cost_model.work import list_stage_work
from megatron_mosaic.plan import Layout, ModulePlan, RankSet, Recompute, ScheduleChoice
from megatron_mosaic.search.pins import Pins
from megatron_mosaic.search.sketches.module_options import ModuleOptions
from megatron_mosaic.search.space import SearchConfig, Space
from tests.cases import LLM, VISION, WORKLOAD, make_cluster


@pytest.mark.parametrize("recompute", [Recompute.none, Recompute.full, Recompute.whole])
@pytest.mark.parametrize("module", [VISION, LLM], ids=lambda module: module.name)
def test_bytes_are_those_of_the_heaviest_stage(module, recompute):
    # Oracle: stage_memory of each stage of a plan; without the buffers between stages, which rows leave out
    pin = Pins.model_validate({module.name: {"recompute": recompute.value, "layout": {"tp": 1}}})
    space = Space(workload=WORKLOAD, cluster=make_cluster(4), config=SearchConfig(pin=pin))
    model = CostModel(WORKLOAD, space.cluster)
    options = ModuleOptions(module, space, model.source, recomputes=len(Recompute))
    seen = set()
    for i, row in enumerate(options.rows):
        layout = row.layout
        if layout.dp > 1 or layout.pp == 3:
            continue
        seen.add(layout.pp)
        _, held, live = options.costs(np.array([i]), np.array([2]))
        alone = ModulePlan(ranks=RankSet.block(0, 1), layout=Layout(), unit=1)
        placed = replace(alone, ranks=RankSet.block(0, layout.num_ranks), layout=layout, recompute=recompute)
        modules = {each.name: alone for each in WORKLOAD.modules} | {module.name: placed}
        lanes = list_stage_work(space.make_plan(2, modules, ScheduleChoice("1f1b")), WORKLOAD, 4).lanes
        precision, setup = model.source.precision, model.source.setup
        stages = [stage_memory(lane.work, precision, setup) for lane in lanes if lane.module == module.name]
        library = precision.library_bytes  # so much that nothing else would be seen
        always = [s.static_bytes - s.static.buffers + s.workspace_bytes - library for s in stages]
        assert (
            max(always) <= (held[0] - library) * (1 + 1e-9) <= 1.05 * max(always)
        )  # embedding and head of one matrix count twice
        units = [s.unit_bytes for s in stages]
        if layout.pp == 1:
            assert live[0] == pytest.approx(units[0])
        else:  # of the last stage one unit is alive, of those before it more
            assert max(units[:-1]) <= live[0] * (1 + 1e-9) <= max(units) * (1 + 2e-9)
    assert seen == {1, 2, 4}
