"""Training runs that save and load, several in one forked world; and every number of a run's state, put together.

A dump is taken before the optimizer step of a given iteration: parameters and optimizer state are then those that the
iteration before left behind, or that a checkpoint brought.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sklearn.datasets  # noqa: F401  seconds to import; forked ranks inherit it
import torch
from megatron.core.optimizer import ChainedOptimizer
from megatron.training import get_args
from megatron.training import training as megatron_training

from megatron_mosaic.any2any import pretrain
from megatron_mosaic.errors import RankFailure
from megatron_mosaic.launch.forked import run_forked, with_command_line
from megatron_mosaic.parallel_state_ext.optimizers.module_optimizers import ModuleOptimizers
from megatron_mosaic.parallel_state_ext.rebound import cpu
from megatron_mosaic.plan import Layout, Plan
from megatron_mosaic.plan.plan_file import save_plan
from megatron_mosaic.runtime.model import MosaicModel
from megatron_mosaic.runtime.parameters import Cut, cut_of, put_together, whole_name
from megatron_mosaic.runtime.train import Runtime
from tests.forked import free_port
from tests.numerics import parity_cases as cases

STEADY = ["--lr", "1e-2", "--lr-decay-style", "constant", "--lr-warmup-fraction", "0.0", "--eval-iters", "0"]
SMALL = ["--log-interval", "1000", "--train-iters", "4"]

SMALL_PLAN = cases.any2any_plan(("0", Layout()), ("0-1", Layout(dp=2)), ("1", Layout()), world_size=2, batch=4)


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training run under a plan. `dump_at`: the iteration before whose step the state is written."""

    name: str
    plan: Plan
    arguments: tuple[str, ...] = ()
    dump_at: int = -1


def run_all(runs: Sequence[Run], directory: Path) -> None:
    """The runs one after the other, in one world of forked ranks; each leaves `directory/<name>/`."""
    cpu.install()
    ports = [free_port() for _ in runs]
    for run in runs:
        (directory / run.name).mkdir()
        save_plan(run.plan, directory / run.name / "plan.yaml")
    run_forked(max(run.plan.world_size for run in runs), _run_on_rank, runs, directory, ports)


def _run_on_rank(runs: Sequence[Run], directory: Path, ports: Sequence[int]) -> None:
    for run, port in zip(runs, ports, strict=True):
        if int(os.environ["RANK"]) >= run.plan.world_size:
            continue
        enter_world(run.plan.world_size, port)
        own = directory / run.name
        _dump_before_step(run.dump_at, own)
        files = ["--mosaic-plan", str(own / "plan.yaml"), "--mosaic-report", str(own)]
        try:
            code = with_command_line([*STEADY, *SMALL, *files, *run.arguments], pretrain.main)
        except SystemExit as stop:  # --exit-interval
            code = stop.code
        assert not code, f"{run.name}: exit status {code}"
        forget_run()


def enter_world(world_size: int, port: int) -> None:
    """The next run of this rank meets the others in a world of its own, which its rank 0 serves.

    The launcher's store remembers the run before.
    """
    own_world = {"WORLD_SIZE": str(world_size), "MASTER_PORT": str(port)}
    os.environ.update(own_world, TORCHELASTIC_USE_AGENT_STORE="False")


def forget_run() -> None:
    """Leave the process as the next run wants to find it."""
    megatron_training.destroy_global_state()
    # Once set, a further all-reduce at start-up: ranks that sat out the runs before would not take part.
    megatron_training._STARTUP_TIMESTAMPS.update(dict.fromkeys(megatron_training._STARTUP_TIMESTAMPS))
    for key, stock in _STOCK.items():
        setattr(megatron_training, key, stock)


def saving(directory: Path, *arguments: str) -> tuple[str, ...]:
    """Every second step, to `directory/checkpoints`."""
    return ("--save", str(directory / "checkpoints"), "--save-interval", "2", *arguments)


def loading(directory: Path, *arguments: str) -> tuple[str, ...]:
    """From step 2 of `directory/checkpoints`."""
    return ("--load", str(directory / "checkpoints"), "--ckpt-step", "2", *arguments)


def failure_of(directory: Path, name: str, *arguments: str, plan: Plan = SMALL_PLAN) -> str:
    """What a run says that must fail."""
    with pytest.raises(RankFailure) as failure:
        run_all([Run(name=name, plan=plan, arguments=arguments)], directory)
    return failure.value.got


def losses(directory: Path, name: str) -> list[dict[str, float]]:
    """Losses per step of a run."""
    steps = [json.loads(line) for line in (directory / name / "losses.jsonl").read_text().splitlines()]
    return [{key: value for key, value in step.items() if key != "iteration"} for step in steps]


_REBOUND = ("get_forward_backward_func", "get_megatron_optimizer", "save_checkpoint", "load_checkpoint")
_STOCK = {key: getattr(megatron_training, key) for key in _REBOUND}
_build_model, _step_all = Runtime.build_model, ModuleOptimizers._step_all


def _dump_before_step(iteration: int, directory: Path) -> None:
    models: list[MosaicModel] = []

    def build_model(self: Runtime, *args: Any) -> MosaicModel:
        models.append(_build_model(self, *args))
        return models[0]

    def step(self: ModuleOptimizers) -> Any:
        if get_args().curr_iteration == iteration:
            np.savez(directory / f"state-{os.environ['RANK']}.npz", **_state(models[0], self))
        return _step_all(self)

    Runtime.build_model, ModuleOptimizers._step_all = build_model, step


def _state(model: MosaicModel, optimizers: ModuleOptimizers) -> dict[str, np.ndarray]:
    """`module/parameter/what|dim|pieces|slice|start|shape of the slice` -> this rank's flat part of it."""
    parts: dict[str, np.ndarray] = {}
    for module, optimizer in optimizers.by_module.items():
        members = optimizer.chained_optimizers if isinstance(optimizer, ChainedOptimizer) else [optimizer]
        stages = [wrapped.module for wrapped in model.stages_of(module)]
        named = {id(p): (stage, name) for stage in stages for name, p in stage.named_parameters()}
        for parameter, start, tensors in (found for member in members for found in _tensors_of(member)):
            stage, name = named[id(parameter)]
            cut = cut_of(stage, name, parameter) or Cut(-1, 0, 1)
            shape = "x".join(map(str, parameter.shape))
            for what, tensor in tensors.items():
                at = 0 if what in ("weight", "step") else start
                array = tensor.detach().float().reshape(-1).numpy()
                key = f"{module}/{whole_name(stage, name)}/{what}"
                parts[f"{key}|{cut.dim}|{cut.pieces}|{cut.rank}|{at}|{shape}"] = array
    return parts


def _tensors_of(member: Any) -> list[tuple[torch.nn.Parameter, int, dict[str, torch.Tensor]]]:
    """(parameter, where this rank's piece of its flat state starts, state name -> piece) of one Megatron optimizer."""
    found = []
    if hasattr(member, "model_param_group_index_map"):  # distributed
        for parameter in member.model_param_group_index_map:
            start = member._get_model_param_range_map(parameter)["param"].start
            state = member._get_main_param_and_optimizer_states(parameter)
            found.append((parameter, start, {"weight": parameter, "main": state.pop("param"), **state}))
    elif hasattr(member, "fp32_from_float16_groups"):
        for models, mains in zip(member.float16_groups, member.fp32_from_float16_groups, strict=True):
            for parameter, main in zip(models, mains, strict=True):
                found.append((parameter, 0, {"weight": parameter, "main": main, **member.optimizer.state[main]}))
    else:
        for group in member.optimizer.param_groups:
            for parameter in group["params"]:
                found.append((parameter, 0, {"weight": parameter, **member.optimizer.state[parameter]}))
    return found


def read_state(directory: Path, name: str) -> dict[str, np.ndarray]:
    """`module/parameter/what` -> the whole array. AssertionError if two ranks hold different replicas."""
    flat: dict[str, dict[tuple[int, tuple[int, ...]], dict[int, np.ndarray]]] = {}
    cuts: dict[str, tuple[int, int]] = {}
    for path in sorted((directory / name).glob("state-*.npz")):
        with np.load(path) as arrays:
            for key, array in arrays.items():
                label, dim, pieces, rank, start, shape = key.split("|")
                cuts[label] = (int(dim), int(pieces))
                place = (int(rank), tuple(int(n) for n in shape.split("x")))
                parts = flat.setdefault(label, {}).setdefault(place, {})
                if int(start) in parts:
                    np.testing.assert_array_equal(parts[int(start)], array, err_msg=f"replicas of {key} in {name}")
                parts[int(start)] = array
    whole = {}
    for label, slices in flat.items():
        dim, pieces = cuts[label]
        joined = []
        for (_, shape), parts in sorted(slices.items()):
            flat_slice = np.concatenate([parts[start] for start in sorted(parts)])
            joined.append(flat_slice if label.endswith("/step") else flat_slice.reshape(shape))
        is_whole = dim < 0 or label.endswith("/step")
        whole[label] = joined[0] if is_whole else put_together(joined, dim, pieces)
    return whole
