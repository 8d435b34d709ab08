"""Weights are a function of their names: shards of any layout, put together, are the undivided module bit for bit."""

import sys
from dataclasses import replace
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallelConfig

from megatron_mosaic.any2any.arguments import MEGATRON_DEFAULTS, add_any2any_arguments, workload_from_args
from megatron_mosaic.any2any.definition import Any2Any
from megatron_mosaic.any2any.sizes import Any2AnySizes, workload
from megatron_mosaic.errors import ConfigError
from megatron_mosaic.parallel_state_ext.grids import Grids
from megatron_mosaic.parallel_state_ext.rank_view import RankView
from megatron_mosaic.parallel_state_ext.rebound import cpu
from megatron_mosaic.plan import Layout, ModulePlan, RankSet
from megatron_mosaic.plan.plan_file import save_plan
from megatron_mosaic.plan.training import Format, Sharding, TrainingSetup
from megatron_mosaic.runtime import arguments
from megatron_mosaic.runtime.arguments import parse_and_validate_args
from megatron_mosaic.runtime.model import initialize_by_name, wrap_stage
from megatron_mosaic.runtime.parameters import cut_of, is_first_replica, put_together, whole_name
from tests.cases import make_plan
from tests.forked import run_gloo

pytestmark = pytest.mark.dist

PLAN = make_plan(
    {"vision": ("0-3", Layout(pp=4)), "llm": ("0-3", Layout(tp=2, pp=2)), "generator": ("1-3", Layout(dp=3))},
    workload=workload(Any2AnySizes(), 16),
)


def parse(path):
    sys.argv = ["pretrain", "--mosaic-plan", str(path)]
    args, plan = parse_and_validate_args(workload_from_args, add_any2any_arguments, MEGATRON_DEFAULTS)
    parallel_state._set_global_memory_buffer()
    return Any2Any.from_args(args, workload_from_args(args)), plan


WHOLE = ModulePlan(ranks=RankSet.of([0]), layout=Layout())


def build(definition, module, placed, stage, groups, seed=5) -> torch.nn.Module:
    torch.manual_seed(dist.get_rank())  # whatever the constructors draw must not matter
    built = definition.build_stage(module, placed, stage, groups)
    built.pg_collection = groups
    initialize_by_name(built, module, seed)
    return built


def check_shards(path) -> None:
    definition, plan = parse(path)
    view = RankView.of(plan, dist.get_rank())
    grids = Grids(view, timeout=timedelta(seconds=30))
    whole = {module: build(definition, module, WHOLE, 0, grids.alone_view()) for module in plan.modules}
    mine = {}  # (module, name in the whole module, number of the slice) -> (where it is cut, values)
    for module, groups in grids.collections.items():
        stage = build(definition, module, plan.modules[module], view.modules[module].at.pp, groups)
        for name, parameter in stage.named_parameters():
            cut = cut_of(stage, name, parameter)
            if cut is not None or is_first_replica(stage, name, parameter):
                mine[module, whole_name(stage, name), cut.rank if cut else 0] = cut, parameter.detach()
    gathered = [None] * 4
    dist.all_gather_object(gathered, mine)
    slices = {}
    for one in gathered:
        for key, (cut, values) in one.items():
            assert key not in slices or torch.equal(values, slices[key][1]), f"copies of {key} differ"
            slices[key] = cut, values
    num_cut = 0
    for module, undivided in whole.items():
        parameters = dict(undivided.named_parameters())
        assert {name for m, name, _ in slices if m == module} == set(parameters)
        for name, expected in parameters.items():
            cut, values = slices[module, name, 0]
            if cut is not None:
                parts = [slices[module, name, rank][1].numpy() for rank in range(cut.size)]
                values = torch.from_numpy(put_together(parts, cut.dim, cut.pieces))
                num_cut += 1
            assert torch.equal(values, expected), f"{module}/{name}"
    assert num_cut > 10


def test_shards_together_are_the_undivided_module(tmp_path) -> None:
    cpu.install()
    save_plan(PLAN, tmp_path / "plan.yaml")
    run_gloo(4, check_shards, tmp_path / "plan.yaml")


def check_streams(path) -> None:
    """Every matrix has its own stream, of Megatron's standard deviation; another seed gives other weights."""
    definition, plan = parse(path)
    groups = Grids(RankView.of(plan, dist.get_rank()), timeout=timedelta(seconds=30)).alone_view()
    stages = {module: build(definition, module, WHOLE, 0, groups) for module in plan.modules}
    other = build(definition, "vision", WHOLE, 0, groups, seed=6)
    first = set()
    for module, stage in stages.items():
        for name, parameter in stage.named_parameters():
            if parameter.dim() > 1:
                first.add(float(parameter.flatten()[0]))
                std = 0.1 / (8**0.5 if name.endswith(("linear_proj.weight", "linear_fc2.weight")) else 1)
                spread = 5 * std / (2 * parameter.numel()) ** 0.5  # five standard errors of a standard deviation
                assert float(parameter.std()) == pytest.approx(std, abs=spread), f"{module}/{name}"
            elif name.endswith("bias"):
                assert not parameter.any(), f"{module}/{name}"
            else:
                assert torch.equal(parameter, torch.ones_like(parameter)), f"{module}/{name}"
    assert len(first) == sum(p.dim() > 1 for stage in stages.values() for p in stage.parameters())
    assert first.isdisjoint(float(p.flatten()[0]) for p in other.parameters() if p.dim() > 1)


def test_streams_are_separate_and_of_megatrons_scale(tmp_path) -> None:
    cpu.install()
    everywhere = make_plan(
        {m: ("0", Layout()) for m in PLAN.modules}, workload=workload(Any2AnySizes(), 16), world_size=1
    )
    save_plan(everywhere, tmp_path / "plan.yaml")
    run_gloo(1, check_streams, tmp_path / "plan.yaml")


def check_wrapping(path) -> None:
    definition, plan = parse(path)
    groups = Grids(RankView.of(plan, dist.get_rank()), timeout=timedelta(seconds=30)).alone_view()
    config = DistributedDataParallelConfig()
    wrapped = wrap_stage(build(definition, "vision", WHOLE, 0, groups), config, groups)
    assert wrapped.ddp_config.bucket_size is not None, "this is what must not reach the next module"
    assert config == DistributedDataParallelConfig()


def test_wrapping_a_stage_leaves_the_config_of_the_others_alone(tmp_path) -> None:
    cpu.install()
    save_plan(PLAN, tmp_path / "plan.yaml")
    run_gloo(4, check_wrapping, tmp_path / "plan.yaml")


@pytest.mark.parametrize("flag", ["--qk-layernorm", "--moe-z-loss-coeff=1e-3", "--log-params-norm"])
def test_arguments_that_a_plan_does_not_carry_over_are_refused_by_name(flag, tmp_path, monkeypatch) -> None:
    save_plan(PLAN, tmp_path / "plan.yaml")
    monkeypatch.setattr(sys, "argv", ["pretrain", "--mosaic-plan", str(tmp_path / "plan.yaml"), flag])
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(ConfigError, match=flag.partition("=")[0]):
        parse_and_validate_args(workload_from_args, add_any2any_arguments, MEGATRON_DEFAULTS)


def test_the_training_of_a_plan_is_written_into_the_arguments(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setattr(arguments, "set_global_variables", lambda args: None)  # forked ranks would inherit them

    def parsed(*words: str):
        plan = replace(
            PLAN, training=TrainingSetup(format=Format.bf16, sharding=Sharding.optimizer), cluster="h100_1x8"
        )
        save_plan(plan, tmp_path / "plan.yaml")
        monkeypatch.setattr(sys, "argv", ["pretrain", "--mosaic-plan", str(tmp_path / "plan.yaml"), *words])
        return parse_and_validate_args(workload_from_args, add_any2any_arguments, MEGATRON_DEFAULTS)[0]

    with pytest.raises(ConfigError, match="--fp8-format"):
        parsed("--fp8-format", "hybrid")
    args = parsed("--bf16")
    assert args.bf16 and args.params_dtype is torch.bfloat16 and args.use_distributed_optimizer
