"""Dropout masks of real ranks: equal where a tensor is replicated, different everywhere else.

One gloo world of four ranks draws a mask in each of the three streams (replicated, model-parallel, expert) of each
module; rank 0 compares them by the modules' coordinates. The oracle is Megatron's meaning of the three streams.
"""

import itertools
from functools import partial

import pytest
import torch
import torch.distributed as dist
from megatron.core import tensor_parallel
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker, get_expert_parallel_rng_tracker_name

from megatron_mosaic.parallel_state_ext.rank_view import RankView
from megatron_mosaic.parallel_state_ext.rebound import cpu
from megatron_mosaic.parallel_state_ext.scope import Scopes
from megatron_mosaic.plan import Layout
from tests.cases import make_plan
from tests.forked import run_gloo

pytestmark = pytest.mark.dist

LAYOUTS = {
    "vision": ("0-3", Layout(tp=2, dp=2)),
    "llm": ("0-3", Layout(cp=2, pp=2)),
    "generator": ("0-3", Layout(dp=4, ep=2)),
}
PLAN = make_plan(LAYOUTS)
SIZE = 256


def masks_of(scopes: Scopes, module: str) -> dict[str, list[float]]:
    """Masks of the replicated, the model-parallel and the expert stream."""
    tracker = get_cuda_rng_tracker()
    streams = {"replicated": None, "sharded": tracker.fork, "expert": None}
    streams["expert"] = partial(tracker.fork, get_expert_parallel_rng_tracker_name())
    masks = {}
    with scopes.enter(module):
        for name, fork in streams.items():
            if fork is None:
                masks[name] = torch.nn.functional.dropout(torch.ones(SIZE), 0.5).tolist()
                continue
            with fork():
                masks[name] = torch.nn.functional.dropout(torch.ones(SIZE), 0.5).tolist()
    return masks


def drawn(plan) -> list[dict]:
    """For each rank: (module, coordinates) -> its masks."""
    view = RankView.of(plan, dist.get_rank())
    scopes = Scopes(7, view)
    mine = {}
    for name, module in view.modules.items():
        place = (name, module.at.pp, module.at.dp, module.at.cp, module.at.tp)
        mine[place] = masks_of(scopes, name)
    gathered = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, mine)
    return gathered


def check_masks() -> None:
    all_masks = [(place, masks) for of_rank in drawn(PLAN) for place, masks in of_rank.items()]
    for (place, masks), (other, others) in itertools.combinations(all_masks, 2):
        tp_replicas = place[:-1] == other[:-1]
        assert (masks["replicated"] == others["replicated"]) == tp_replicas, (place, other)
        assert masks["sharded"] != others["sharded"], (place, other)
        assert masks["expert"] != others["expert"], (place, other)
        assert masks["replicated"] != others["sharded"] and masks["replicated"] != others["expert"]


def test_masks_are_equal_on_tp_replicas_and_nowhere_else() -> None:
    cpu.install()
    run_gloo(4, check_masks)


def check_placement() -> None:
    """vision (tp2 dp2) on four ranks, then beside nobody on the same ranks in another world's order of modules."""
    here = {place: masks for of_rank in drawn(PLAN) for place, masks in of_rank.items() if place[0] == "vision"}
    small = make_plan({"vision": ("1-2", Layout(dp=2)), "llm": ("0", Layout())})
    there = {place: masks for of_rank in drawn(small) for place, masks in of_rank.items() if place[0] == "vision"}
    assert len(here) == 4 and len(there) == 2
    for place, masks in there.items():
        assert masks == here[place], place


def test_masks_depend_on_the_place_in_the_module_not_on_ranks_or_neighbours() -> None:
    cpu.install()
    run_gloo(4, check_placement)


def check_recomputation() -> None:
    """x is 1, so output and derivative are the mask: a backward with another mask would show."""
    scopes = Scopes(7, RankView.of(PLAN, dist.get_rank()))

    def layer(x):
        x = torch.nn.functional.dropout(x, 0.5)
        with get_cuda_rng_tracker().fork():
            return torch.nn.functional.dropout(x, 0.5)

    inputs = {name: torch.ones(SIZE, requires_grad=True) for name in PLAN.modules}
    outputs = {}
    for name, x in inputs.items():
        with scopes.enter(name):
            outputs[name] = tensor_parallel.checkpoint(layer, False, x)
    for name in reversed(outputs):  # another order than forward's
        with scopes.enter(name):
            outputs[name].sum().backward()
    for name, x in inputs.items():
        assert torch.equal(x.grad, outputs[name].detach()), name


def test_recomputation_inside_a_modules_scope_draws_its_masks_again() -> None:
    cpu.install()
    run_gloo(4, check_recomputation)
