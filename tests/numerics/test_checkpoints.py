"""A checkpoint of one plan under another: every parameter and optimizer state to the bit, and the same curve after.

The oracle is the run that saved and went on: its state before step 3, and its losses of steps 3 and 4. Where the plan
is the same, losses are equal to the bit too; under another plan sums are taken in another order.
"""

import functools
import json
import os
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch.distributed as dist
from megatron.training import get_args

from megatron_mosaic.frozen import FrozenMap
from megatron_mosaic.plan import Layout, ScheduleChoice
from megatron_mosaic.plan.plan_file import load_plan
from megatron_mosaic.plan.training import Format, Sharding, TrainingSetup
from megatron_mosaic.plan.workload_file import format_workload
from megatron_mosaic.runtime import model
from megatron_mosaic.runtime.checkpoint_files import manifest as checkpoint
from tests.numerics import acceptance_cases as acceptance
from tests.numerics import parity_cases as cases
from tests.numerics.checkpoint_runs import SMALL_PLAN, Run, failure_of, loading, losses, read_state, run_all, saving

pytestmark = pytest.mark.dist

A = cases.any2any_plan(
    ("0-1", Layout(dp=2)), ("0-3", Layout(tp=2, pp=2)), ("2-3", Layout(tp=2)), batch=6, micro_batch=1
)
TWO_RANKS = cases.any2any_plan(
    ("1", Layout()), ("0-1", Layout(dp=2)), ("0-1", Layout(pp=2)), world_size=2, batch=6, micro_batch=3
)
IDLE_RANK = cases.any2any_plan(
    ("1-2", Layout(tp=2)), ("1-2", Layout(pp=2)), ("2", Layout()), world_size=3, batch=6, micro_batch=2
)
MOVED = cases.any2any_plan(
    ("2-3", Layout(dp=2)), ("0-3", Layout(tp=2, pp=2)), ("0-1", Layout(tp=2)), batch=6, micro_batch=2
)
DROPOUT = ("--hidden-dropout", "0.1", "--attention-dropout", "0.1")


def relative_loss_error(ours, theirs) -> float:
    assert len(ours) == len(theirs) > 0
    return max(abs(a[key] - b[key]) / abs(b[key]) for a, b in zip(ours, theirs, strict=True) for key in b)


@pytest.mark.parametrize(
    ("arguments", "tolerance"),
    [
        pytest.param((), 1e-6, id="fp32"),
        pytest.param(("--use-distributed-optimizer",), 1e-6, id="distributed optimizer"),
        pytest.param(("--bf16",), 1e-2, id="bf16"),
        pytest.param(("--bf16", "--use-distributed-optimizer"), 1e-2, id="bf16 distributed optimizer"),
    ],
)
def test_any_plan_loads_what_another_saved(arguments, tolerance, tmp_path) -> None:
    """4 ranks -> the same 4, 2, 3 of which one is idle, and 4 with modules that changed places."""
    plans = {"same": A, "two ranks": TWO_RANKS, "idle rank": IDLE_RANK, "moved": MOVED}
    if "--bf16" in arguments:
        plans = {"idle rank": IDLE_RANK}
    run_all(
        [
            Run(name="whole", plan=A, arguments=saving(tmp_path, *arguments), dump_at=2),
            *(
                Run(name=name, plan=plan, arguments=loading(tmp_path, *arguments), dump_at=2)
                for name, plan in plans.items()
            ),
        ],
        tmp_path,
    )
    expected, curve = read_state(tmp_path, "whole"), losses(tmp_path, "whole")[2:]
    kinds = {key.rpartition("/")[2] for key in expected}
    assert kinds == {"weight", "exp_avg", "exp_avg_sq", "step"} | ({"main"} if arguments else set())
    assert all((array == 2).all() for key, array in expected.items() if key.endswith("/step"))
    assert all(array.any() for key, array in expected.items() if key.endswith("exp_avg"))
    for name in plans:
        found = read_state(tmp_path, name)
        assert found.keys() == expected.keys()
        for key, array in expected.items():
            if not key.endswith("/step"):
                np.testing.assert_array_equal(found[key], array, err_msg=f"{key} under {name}")
            assert (found[key] == 2).all() or not key.endswith("/step"), key
        error = relative_loss_error(losses(tmp_path, name), curve)
        assert error <= tolerance, (name, error)
        assert error == 0 or name != "same"


@pytest.mark.parametrize("arguments", [(), ("--use-distributed-optimizer",)], ids=["plain", "distributed optimizer"])
def test_experts_virtual_stages_and_split_tokens_load_what_another_saved(arguments, tmp_path) -> None:
    """From cp and ep to sequence parallelism, to virtual stages on two ranks, to other groups of experts."""
    workload = acceptance.MOE
    (tmp_path / "model.yaml").write_text(format_workload(workload))
    arguments = (*arguments, "--workload", str(tmp_path / "model.yaml"))
    whole = acceptance.case("", "", workload, mbs=1, microbatches=4, image="0-3 dp4 ep2", llm="0-3 cp2 dp2 ep2").plan
    plans = [
        acceptance.case("", "", workload, mbs=mbs, microbatches=microbatches, schedule=schedule, **modules).plan
        for mbs, microbatches, schedule, modules in (
            (2, 4, "1f1b", {"image": "0-3 tp2 dp2 ep2 sp", "llm": "0-3 tp2 pp2 ep2 sp"}),
            (2, 4, "interleaved", {"image": "1", "llm": "0-1 pp2 vpp2"}),
            (1, 2, "1f1b", {"image": "0-2 dp3", "llm": "0-3 dp4 ep4"}),
        )
    ]
    runs = [Run(name="whole", plan=whole, arguments=saving(tmp_path, *arguments), dump_at=2)]
    runs += [Run(name=str(i), plan=p, arguments=loading(tmp_path, *arguments), dump_at=2) for i, p in enumerate(plans)]
    run_all(runs, tmp_path)
    expected, curve = read_state(tmp_path, "whole"), losses(tmp_path, "whole")[2:]
    for i in range(len(plans)):
        found = read_state(tmp_path, str(i))
        assert found.keys() == expected.keys()
        for key, array in expected.items():
            np.testing.assert_array_equal(found[key].ravel(), array.ravel(), err_msg=f"{key} under plan {i}")
        assert relative_loss_error(losses(tmp_path, str(i)), curve) <= 1e-6, i


def test_a_plan_saved_by_fewer_ranks_loads_on_more(tmp_path) -> None:
    """2 -> 3 -> 4: what was loaded under one plan is saved and loaded again under the next."""
    second = ("--save", str(tmp_path / "second"), "--save-interval", "3")
    run_all(
        [
            Run(name="whole", plan=TWO_RANKS, arguments=saving(tmp_path), dump_at=3),
            Run(name="three", plan=IDLE_RANK, arguments=(*loading(tmp_path), *second), dump_at=3),
            Run(name="four", plan=MOVED, arguments=("--load", str(tmp_path / "second"), "--ckpt-step", "3"), dump_at=3),
        ],
        tmp_path,
    )
    three, four = read_state(tmp_path, "three"), read_state(tmp_path, "four")
    assert three.keys() == four.keys() == read_state(tmp_path, "whole").keys()
    for key, array in three.items():
        np.testing.assert_array_equal(four[key], array, err_msg=key)
    assert relative_loss_error(losses(tmp_path, "four"), losses(tmp_path, "whole")[3:]) <= 1e-5


def test_a_plan_that_differs_in_cluster_training_or_schedule_loads(tmp_path) -> None:
    """None of them says where a parameter lies. Another number format rounds anew: then losses agree as far as that."""
    saved_by = replace(A, cluster="h100_1x8", training=TrainingSetup(format=Format.fp32, sharding=Sharding.optimizer))
    elsewhere = {"kind": "local", "num_ranks": 4, "profile": "made up"}
    overlapped = replace(saved_by.training, gradient_overlap_frac=0.9)
    plans = {
        "without": (replace(saved_by, cluster="", training=None), 0.0),
        "cluster": (replace(saved_by, cluster=FrozenMap(elsewhere), training=overlapped), 0.0),
        "schedule": (replace(saved_by, schedule=ScheduleChoice("nested")), 1e-6),
        "format": (replace(saved_by, training=replace(overlapped, format=Format.bf16)), 1e-2),
    }
    runs = [Run(name="whole", plan=saved_by, arguments=saving(tmp_path))]
    for name, (plan, _) in plans.items():
        flags = () if plan.training else ("--use-distributed-optimizer",)
        runs.append(Run(name=name, plan=plan, arguments=loading(tmp_path, *flags)))
    run_all(runs, tmp_path)
    for name, (_, tolerance) in plans.items():
        error = relative_loss_error(losses(tmp_path, name), losses(tmp_path, "whole")[2:])
        assert error <= tolerance, (name, error)


def test_random_streams_return_to_the_same_layout_and_start_afresh_elsewhere(tmp_path) -> None:
    """With dropout the curve is the same to the bit only if every stream is; a module may have moved to other ranks."""
    run_all(
        [
            Run(name="whole", plan=A, arguments=saving(tmp_path, *DROPOUT)),
            Run(name="same", plan=A, arguments=loading(tmp_path, *DROPOUT)),
            Run(name="without", plan=A, arguments=loading(tmp_path, *DROPOUT, "--no-load-rng")),
            Run(name="other", plan=TWO_RANKS, arguments=loading(tmp_path, *DROPOUT)),
            Run(name="again", plan=TWO_RANKS, arguments=loading(tmp_path, *DROPOUT)),
        ],
        tmp_path,
    )
    curve = losses(tmp_path, "whole")[2:]
    assert losses(tmp_path, "same") == curve
    assert losses(tmp_path, "without") != curve and losses(tmp_path, "other") != curve
    assert losses(tmp_path, "other") == losses(tmp_path, "again")
    assert relative_loss_error(losses(tmp_path, "other"), curve) < 0.5


def test_the_plan_and_a_list_of_files_stand_beside_the_checkpoint(saved) -> None:
    plan = load_plan(saved / "iter_0000002" / checkpoint.PLAN_FILE)
    assert plan == replace(SMALL_PLAN, digest=cases.WORKLOAD.digest)
    manifest = json.loads((saved / "iter_0000002" / checkpoint.MANIFEST_FILE).read_text())
    assert manifest["iteration"] == 2 and set(manifest["bytes_by_file"]) >= {"metadata.json", ".metadata"}
    assert not list(saved.glob("*/*.partial"))


def test_what_cannot_be_loaded_is_refused_by_name_and_the_last_good_checkpoint_stays(saved, tmp_path) -> None:
    load = ("--load", str(saved))
    last = saved / "iter_0000004"
    shard = sorted(last.glob("*.distcp"))[0]
    text = (last / checkpoint.PLAN_FILE).read_text()

    (last / checkpoint.PLAN_FILE).write_text(text.replace(cases.WORKLOAD.digest, "0123456789ab"))
    assert "mosaic_plan.yaml: digest" in (got := failure_of(tmp_path, "digest", *load)) and "status 2" in got
    (last / checkpoint.PLAN_FILE).write_text(text.replace("any2any-digits", "other"))
    assert "mosaic_plan.yaml: workload" in failure_of(tmp_path, "workload", *load)
    (last / checkpoint.PLAN_FILE).write_text(text)

    got = failure_of(tmp_path, "optimizer", *load, "--use-distributed-optimizer")
    assert "--use-distributed-optimizer" in got and "status 2" in got

    content = shard.read_bytes()
    shard.write_bytes(content[: len(content) // 2])
    got = failure_of(tmp_path, "truncated", *load)
    assert f"checkpoint file {shard}" in got and f"expected: {len(content)} bytes" in got
    assert "use --ckpt-step 2, which is complete" in got and "status 2" in got
    shard.unlink()
    assert f"checkpoint file {shard}" in failure_of(tmp_path, "missing", *load)
    (saved / "latest_checkpointed_iteration.txt").write_text("")
    assert "latest_checkpointed_iteration.txt" in failure_of(tmp_path, "tracker", *load)
    (saved / "latest_checkpointed_iteration.txt").write_text("4")

    run_all([Run(name="resumed", plan=SMALL_PLAN, arguments=(*load, "--ckpt-step", "2"))], tmp_path)
    assert losses(tmp_path, "resumed") == losses(tmp_path, "whole")[2:]


def test_a_checkpoint_without_a_plan_loads(saved, tmp_path) -> None:
    for path in saved.glob("*/mosaic_*"):
        path.unlink()
    run_all([Run(name="bare", plan=SMALL_PLAN, arguments=loading(tmp_path))], tmp_path)
    assert losses(tmp_path, "bare") == losses(tmp_path, "whole")[2:]


def test_a_rank_killed_while_it_saves_leaves_the_checkpoint_before(saved, tmp_path, monkeypatch) -> None:
    """The torn directory is neither named by the tracker file nor taken for complete; it is written again later."""
    from megatron.core import dist_checkpointing

    stock = dist_checkpointing.save

    @functools.wraps(stock)
    def killed(state, directory, *args, **kwargs):
        if dist.get_rank() == 1 and directory.endswith("3"):
            os.kill(os.getpid(), signal.SIGKILL)
        return stock(state, directory, *args, **kwargs)

    save = ("--save", str(saved), "--save-interval", "1")
    (saved / "latest_checkpointed_iteration.txt").write_text("2")
    monkeypatch.setattr(dist_checkpointing, "save", killed)
    assert "killed by SIGKILL" in failure_of(tmp_path, "killed", "--load", str(saved), *save)
    monkeypatch.setattr(dist_checkpointing, "save", stock)
    assert (saved / "latest_checkpointed_iteration.txt").read_text() == "2"
    assert (saved / "iter_0000003").is_dir() and not (saved / "iter_0000003" / checkpoint.MANIFEST_FILE).exists()
    run_all([Run(name="resumed", plan=SMALL_PLAN, arguments=("--load", str(saved), *save))], tmp_path)
    assert losses(tmp_path, "resumed") == losses(tmp_path, "whole")[2:]
    assert (saved / "latest_checkpointed_iteration.txt").read_text() == "4"


def test_a_rank_killed_while_it_writes_over_a_checkpoint_leaves_none_that_looks_whole(
    saved, tmp_path, monkeypatch
) -> None:
    """Old and new files have the same names and sizes: only the list beside them can tell."""
    from megatron.core import dist_checkpointing

    stock = dist_checkpointing.save

    @functools.wraps(stock)
    def killed(state, directory, *args, **kwargs):
        if dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return stock(state, directory, *args, **kwargs)

    again = ("--save", str(saved), "--save-interval", "4", *loading(tmp_path))
    monkeypatch.setattr(dist_checkpointing, "save", killed)
    assert "killed by SIGKILL" in failure_of(tmp_path, "killed", *again)
    monkeypatch.setattr(dist_checkpointing, "save", stock)
    (saved / "iter_0000002_copy").mkdir()
    (saved / "iter_0000002_copy" / checkpoint.MANIFEST_FILE).write_text("{}")
    got = failure_of(tmp_path, "torn", "--load", str(saved))
    assert "this one was not saved to its end" in got and "status 2" in got
    run_all([Run(name="resumed", plan=SMALL_PLAN, arguments=loading(tmp_path))], tmp_path)
    assert losses(tmp_path, "resumed") == losses(tmp_path, "whole")[2:]


@pytest.mark.parametrize("skips", [False, True])
def test_a_gradient_that_is_no_number(skips, saved, tmp_path, monkeypatch) -> None:
    """On one rank, in one module: an error on all, or a step that nobody makes; then training resumes from step 2."""
    stock = model.MosaicModel.scale_gradients

    def scale_gradients(self, factor: float) -> None:
        for name, stage in self.stages.items():
            broken = name == "generator" and get_args().curr_iteration == 2
            stage.scale_gradients(float("nan") if broken else factor)

    monkeypatch.setattr(model.MosaicModel, "scale_gradients", scale_gradients)
    save = ("--save", str(saved), "--save-interval", "3")
    if skips:
        arguments = ("--no-check-for-nan-in-loss-and-grad", *loading(tmp_path))
        run_all([Run(name="skipping", plan=SMALL_PLAN, arguments=arguments)], tmp_path)
        first, second = losses(tmp_path, "skipping")
        assert first == losses(tmp_path, "whole")[2] and np.isfinite(list(second.values())).all()
        return
    got = failure_of(tmp_path, "nan", *loading(tmp_path), *save)
    assert "FloatingPointError: gradients of generator are inf or NaN" in got
    monkeypatch.setattr(model.MosaicModel, "scale_gradients", stock)
    run_all([Run(name="resumed", plan=SMALL_PLAN, arguments=loading(tmp_path))], tmp_path)
    assert losses(tmp_path, "resumed") == losses(tmp_path, "whole")[2:]
