"""One gradient norm over modules that overlap, one decision to step. The oracle is the norm of the whole gradients."""

import math
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer import MegatronModule, TransformerConfig

from megatron_mosaic.parallel_state_ext.grids import Grids
from megatron_mosaic.parallel_state_ext.optimizers.module_optimizers import build_optimizer
from megatron_mosaic.parallel_state_ext.rank_view import RankView
from megatron_mosaic.parallel_state_ext.rebound import cpu
from megatron_mosaic.plan import Layout
from megatron_mosaic.plan.layout import coordinates_of
from tests.cases import make_plan
from tests.forked import run_gloo

pytestmark = pytest.mark.dist

# Equal, nested and partly overlapping rank sets, tp, dp, pp, and rank 4 without any module.
PLAN = make_plan(
    {"vision": ("0-2", Layout(dp=3)), "llm": ("0-3", Layout(tp=2, pp=2)), "generator": ("1,3", Layout(tp=2))},
    world_size=5,
)
NAMES = tuple(PLAN.modules)
CONFIG = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1)


def whole_gradient(module: str, stage: int, name: str) -> torch.Tensor:
    """The gradient of an undivided parameter of one stage; every one is different."""
    generator = torch.Generator().manual_seed(100 * NAMES.index(module) + 10 * stage + len(name))
    return torch.randn((8, 6) if name == "sharded" else (5,), generator=generator)


def expected_norm() -> float:
    """Each parameter of each stage of each module once, whatever the degrees of tp and dp."""
    return math.sqrt(
        sum(
            float(whole_gradient(module, stage, name).double().square().sum())
            for module, placed in PLAN.modules.items()
            for stage in range(placed.layout.pp)
            for name in ("sharded", "replicated")
        )
    )


class Toy(MegatronModule):
    """A parameter cut over tp and one that every tp rank has."""

    def __init__(self, groups) -> None:
        super().__init__(CONFIG)
        self.pg_collection = groups
        self.sharded = torch.nn.Parameter(torch.ones(8 // groups.tp.size(), 6))
        self.replicated = torch.nn.Parameter(torch.ones(5))
        if groups.tp.size() > 1:
            set_tensor_model_parallel_attributes(self.sharded, True, 0, 1)


def build(use_distributed_optimizer: bool, clip_grad: float):
    grids = Grids(RankView.of(PLAN, dist.get_rank()), timeout=timedelta(seconds=30))
    ddp_config = DistributedDataParallelConfig(use_distributed_optimizer=use_distributed_optimizer)
    stages = {
        module: [DistributedDataParallel(CONFIG, ddp_config, Toy(groups), pg_collection=groups)]
        for module, groups in grids.collections.items()
    }
    empty = MegatronModule(CONFIG)
    empty.pg_collection = grids.alone_view()
    optimizer = build_optimizer(
        NAMES,
        stages,
        grids.collections,
        DistributedDataParallel(CONFIG, ddp_config, empty, pg_collection=empty.pg_collection),
        grids.world,
        OptimizerConfig(
            optimizer="adam",
            lr=1.0,
            adam_eps=1.0,
            weight_decay=0.0,
            clip_grad=clip_grad,
            use_distributed_optimizer=use_distributed_optimizer,
        ),
    )
    for module, (wrapped,) in stages.items():
        place = coordinates_of(PLAN.modules[module], dist.get_rank())
        for name, parameter in wrapped.module.named_parameters():
            parameter.main_grad.copy_(own_part(module, place, name))
    return optimizer, stages


def own_part(module, place, name) -> torch.Tensor:
    whole = whole_gradient(module, place.pp, name)
    tp = PLAN.modules[module].layout.tp
    return whole.chunk(tp, 0)[place.tp] if name == "sharded" else whole


def check_norm_and_clipping(use_distributed_optimizer: bool) -> None:
    optimizer, stages = build(use_distributed_optimizer, clip_grad=1.0)
    stepped, norm, _ = optimizer.step()
    assert stepped
    assert norm == pytest.approx(expected_norm(), rel=1e-6)
    for module, (wrapped,) in stages.items():
        place = coordinates_of(PLAN.modules[module], dist.get_rank())
        for name, parameter in wrapped.module.named_parameters():
            # Adam's first step from ones, learning rate and eps 1: g / (|g| + 1) of the clipped gradient g
            clipped = own_part(module, place, name) / expected_norm()
            torch.testing.assert_close(1 - parameter.data, clipped / (clipped.abs() + 1), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("use_distributed_optimizer", [False, True], ids=["replicated", "distributed"])
def test_each_parameter_counts_once_and_all_are_clipped_by_one_norm(use_distributed_optimizer) -> None:
    cpu.install()
    run_gloo(5, check_norm_and_clipping, use_distributed_optimizer)


def check_skipping() -> None:
    optimizer, stages = build(False, clip_grad=1.0)
    if dist.get_rank() == 2:  # has vision and llm; ranks 3 (llm, generator) and 4 (idle) see it only over the world
        optimizer.by_module["vision"].prepare_grads = lambda: True
    assert optimizer.step() == (False, None, None)
    for (wrapped,) in stages.values():
        for parameter in wrapped.parameters():
            torch.testing.assert_close(parameter.data, torch.ones_like(parameter), rtol=0, atol=0)


def test_one_modules_overflow_skips_the_step_everywhere() -> None:
    cpu.install()
    run_gloo(5, check_skipping)
