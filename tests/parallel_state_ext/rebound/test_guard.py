"""The guard: what it refuses and how it says so, what it lets through, and that nothing stays behind."""

import json
import os
from dataclasses import replace

import pytest
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import mappings
from megatron.core.transformer import attention

from megatron_mosaic.errors import GroupError
from megatron_mosaic.launch.forked import run_forked, with_command_line
from megatron_mosaic.parallel_state_ext.rebound import cpu, guard
from megatron_mosaic.parallel_state_ext.rebound.guard import SILENT, TOLERATED, Guard, accessors
from megatron_mosaic.plan import Layout, Recompute
from tests.numerics import parity_cases as cases


@pytest.fixture
def active():
    """The guard is on; the one entry names the module whose code runs."""
    names = ["llm"]
    installed = Guard(lambda: names[0]).install()
    yield names
    installed.remove()


@pytest.fixture
def world():
    cpu.install()
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    yield dist.group.WORLD
    dist.destroy_process_group()


def test_a_read_names_module_accessor_and_caller(active) -> None:
    with pytest.raises(GroupError) as error:
        parallel_state.get_tensor_model_parallel_rank()
    assert error.value.where == "module llm"
    assert "get_tensor_model_parallel_rank()" in error.value.got
    line = test_a_read_names_module_accessor_and_caller.__code__.co_firstlineno + 2
    assert f"{__file__}:test_a_read_names_module_accessor_and_caller:{line}" in error.value.got
    assert "pg_collection" in error.value.fix


@pytest.mark.parametrize("name", accessors())
def test_every_accessor_is_refused_inside_a_module(active, name) -> None:
    with pytest.raises(GroupError, match=rf"{name}\(\) of Megatron's global parallel_state"):
        getattr(parallel_state, name)()


def test_names_imported_by_other_modules_are_refused_too(active) -> None:
    assert attention.get_data_parallel_rank is parallel_state.get_data_parallel_rank
    with pytest.raises(GroupError, match="get_data_parallel_rank"):
        attention.get_data_parallel_rank()


def test_a_group_left_out_is_refused_where_it_was_left_out(active, world) -> None:
    with pytest.raises(GroupError, match=r"test_a_group_left_out_is_refused_where_it_was_left_out") as error:
        mappings.reduce_from_tensor_model_parallel_region(cpu.CPU, group=None)
    assert "get_tensor_model_parallel_group_if_none" in error.value.got
    assert mappings.get_tensor_model_parallel_group_if_none(world) is world


def test_between_modules_nothing_is_refused(active, world) -> None:
    active[0] = None
    assert parallel_state.is_initialized() is False
    assert parallel_state.get_virtual_pipeline_model_parallel_rank() is None


def test_remove_puts_every_accessor_back() -> None:
    before = {name: getattr(parallel_state, name) for name in accessors()}
    by_name, helper = attention.get_data_parallel_rank, mappings.get_tensor_model_parallel_group_if_none
    installed = Guard(lambda: "llm").install()
    assert all(getattr(parallel_state, name) is not function for name, function in before.items())
    installed.remove()
    assert {name: getattr(parallel_state, name) for name in before} == before
    assert attention.get_data_parallel_rank is by_name
    assert mappings.get_tensor_model_parallel_group_if_none is helper


def test_the_accessors_that_answer_silently_are_known(world) -> None:
    """They are why the guard exists: Megatron takes their answer for "not parallel"."""
    answers = {}
    for name, function in accessors().items():
        try:
            answers[name] = function()
        except AssertionError:
            continue
    assert answers == SILENT


def train_and_note(path: str) -> None:
    """Train, and leave behind which reads the guard let through."""
    from megatron_mosaic.any2any import pretrain

    remove = Guard.remove

    def note(self: Guard) -> None:
        with open(f"{path}.{os.environ['RANK']}", "w") as file:
            json.dump(sorted(self.tolerated), file)
        remove(self)

    Guard.remove = note
    assert pretrain.main() == 0


@pytest.mark.dist
def test_training_reads_what_is_tolerated_and_nothing_else(tmp_path) -> None:
    """An entry that no run needs any more has to go; a reader that is not listed stops the run."""
    cpu.install()
    plan = cases.any2any_plan(("0-3", Layout(cp=2, dp=2)), ("0-3", Layout(tp=2, pp=2)), ("0-1", Layout(tp=2)), batch=4)
    llm = replace(plan.modules["llm"], recompute=Recompute.full, sequence_parallel=True)
    plan = replace(plan, modules={**plan.modules, "llm": llm})
    command = ["--mosaic-guard", "--mosaic-plan", cases.written(plan, tmp_path)]
    command += ["--train-iters", "2", "--eval-iters", "1", "--use-distributed-optimizer"]
    run_forked(4, with_command_line, command, train_and_note, str(tmp_path / "reads"))
    hit = {tuple(key) for rank in range(4) for key in json.loads((tmp_path / f"reads.{rank}").read_text())}
    assert hit == set(TOLERATED)
    assert len(TOLERATED) <= 3, "the table may only shrink"
    assert all(caller.startswith("megatron.") and reason for (caller, _), reason in TOLERATED.items())


def test_the_environment_switches_the_guard_on(monkeypatch) -> None:
    for value, wanted in (("1", True), ("0", False), ("", False)):
        monkeypatch.setenv(guard.VARIABLE, value)
        assert guard.is_wanted() is wanted
