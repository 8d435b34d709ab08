"""A job without Slurm: what it decides when its ranks have ended, which words srun, torchrun and sbatch get."""

import json
import os
import platform
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_mosaic.cli.main import main
from megatron_mosaic.config import compose_sections, load_workload
from megatron_mosaic.errors import ConfigError
from megatron_mosaic.flight.line import Flight
from megatron_mosaic.flight.suspects import Suspect
from megatron_mosaic.flight.verdict import stamp
from megatron_mosaic.launch.slurm.batch import srun_command
from megatron_mosaic.launch.slurm.cause import note_cause, read_cause
from megatron_mosaic.launch.slurm.ending import EXITS_VARIABLE, Attempt, Ending, decide, exit_status, read_exits
from megatron_mosaic.launch.slurm.job import Form, Job, load_job, plan_file, save_job
from megatron_mosaic.launch.slurm.node import torchrun_words
from megatron_mosaic.launch.slurm.submission import allocate, sbatch_command
from megatron_mosaic.plan import Layout, ModulePlan, Plan, RankSet, ScheduleChoice
from megatron_mosaic.plan.plan_file import save_plan
from megatron_mosaic.runtime.telemetry.prediction import load_prediction

# All went well, at the last step
DONE = Attempt(
    status=0,
    exits={0: 0},
    was_told=False,
    is_cancelled=False,
    saved_steps=40,
    num_steps=40,
    restarts=1,
    max_restarts=3,
)
JOB = Job(
    form=Form.srun,
    num_nodes=3,
    ranks_per_node=8,
    script=("-m", "a.b"),
    arguments=("--lr=1; reboot",),
    plan_words=(),
    size_key="cluster.num_nodes",
    num_steps=40,
    checkpoints="checkpoints",
    max_restarts=3,
    grace_s=150,
    is_predicted=False,
)
DIGITS = load_workload(["model=any2any-digits"])
# A rank with a thread that waits for a peer: only os._exit ends it
STAYS = """
import threading, time
threading.Thread(target=time.sleep, args=(1000,)).start()
from megatron_mosaic.launch.worker import main
"""


@pytest.mark.parametrize(
    ("change", "ending", "status"),
    [
        ({}, Ending.done, 0),
        ({"num_steps": 0, "saved_steps": 0}, Ending.done, 0),  # nobody knows how long it is: it ended by itself
        ({"was_told": True, "saved_steps": 12}, Ending.requeue, 0),
        ({"was_told": True, "num_steps": 0}, Ending.requeue, 0),
        ({"was_told": True}, Ending.done, 0),  # told in its last step
        ({"was_told": True, "status": 143}, Ending.done, 0),  # torchrun's status when it is told, all ranks well
        ({"saved_steps": 12}, Ending.requeue, 0),  # left well before its end: --exit-duration-in-mins
        ({"was_told": True, "status": 143, "exits": {}, "saved_steps": 0}, Ending.requeue, 0),  # told in set-up
        ({"was_told": True, "status": 137, "exits": {1: 1}, "saved_steps": 12}, Ending.requeue, 0),
        # srun's status of a crash is that of the ranks it ended
        ({"status": 143, "exits": {1: 1}, "saved_steps": 12}, Ending.crashed, 1),
        ({"status": 143, "exits": {1: 2}, "saved_steps": 0}, Ending.crashed, 2),
        ({"status": 137, "exits": {}, "saved_steps": 12}, Ending.crashed, 137),  # killed: no word of its own
        ({"status": 1, "exits": {3: 1}}, Ending.crashed, 1),  # after its last checkpoint
        ({"status": 143, "exits": {2: 93}, "saved_steps": 12}, Ending.stopped, 93),
        ({"was_told": True, "status": 143, "exits": {2: 93, 3: 1}, "saved_steps": 12}, Ending.stopped, 93),
        ({"was_told": True, "is_cancelled": True, "saved_steps": 12}, Ending.cancelled, 1),
        ({"was_told": True, "saved_steps": 12, "restarts": 3}, Ending.worn_out, 1),
    ],
)
def test_a_signal_is_told_from_a_crash(change, ending, status) -> None:
    attempt = replace(DONE, **change)
    assert (decide(attempt), exit_status(decide(attempt), attempt)) == (ending, status)


@pytest.mark.parametrize(
    ("code", "left"), [("pass", {0: 0}), ("raise SystemExit(93)", {0: 93}), ("1 / 0", {0: 1}), ("os._exit(0)", {})]
)
def test_a_rank_leaves_the_status_it_ended_with(tmp_path, code, left) -> None:
    """A process that is ended from outside, here by itself, leaves none."""
    (tmp_path / "script.py").write_text(f"import os\n{code}\n")
    (tmp_path / "exits").mkdir()
    environment = os.environ | {
        "RANK": "0",
        "MOSAIC_FLIGHT_DIR": str(tmp_path),
        EXITS_VARIABLE: str(tmp_path / "exits"),
    }
    command = [sys.executable, "-m", "megatron_mosaic.launch.worker", str(tmp_path / "script.py")]
    subprocess.run(command, env=environment, capture_output=True, check=False)
    assert read_exits(tmp_path / "exits") == left


def test_a_rank_that_fails_leaves_its_words_and_where_its_flight_files_are(tmp_path) -> None:
    """As under srun: no launcher of ours has given a directory."""
    (tmp_path / "script.py").write_text("1 / 0\n")
    (tmp_path / "exits").mkdir()
    environment = {key: value for key, value in os.environ.items() if key != "MOSAIC_FLIGHT_DIR"}
    environment |= {"RANK": "3", "TMPDIR": str(tmp_path), EXITS_VARIABLE: str(tmp_path / "exits")}
    command = [sys.executable, "-m", "megatron_mosaic.launch.worker", str(tmp_path / "script.py")]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    words, _, files = read_cause(tmp_path / "exits").rpartition("; flight files: ")
    host, _, directory = files.partition(":")
    assert (words, host) == ("rank 3, start-up", platform.node())
    assert (Path(directory) / "rank-00003").exists() and Path(directory).is_relative_to(tmp_path)
    assert f"mosaic: rank 3: flight files: {files}" in ended.stderr


def test_who_failed_by_itself_is_named_before_who_followed(tmp_path) -> None:
    flights = [Flight(rank, str(tmp_path)) for rank in (0, 1, 2)]
    for flight, follows in ((flights[0], True), (flights[1], False)):
        flight.note(f"step {flight.rank}")
        stamp(flight, at_ns=1, follows=follows)
    assert read_cause(tmp_path) == ""
    for flight in flights:
        note_cause(tmp_path, flight)
    assert read_cause(tmp_path) == "rank 1, step 1"


def test_of_several_that_failed_by_themselves_the_first_is_named(tmp_path) -> None:
    for rank, kind, at_s in ((0, "follower", 1), (1, "suspect", 2), (2, "cause", 9), (3, "cause", 8)):
        path = tmp_path / f"{kind}-{rank:05d}"
        path.write_text(f"rank {rank}\n")
        os.utime(path, (at_s, at_s))
    said = []
    for rank, kind in ((3, "cause"), (2, "cause"), (1, "suspect"), (0, "follower")):
        said.append(read_cause(tmp_path))
        (tmp_path / f"{kind}-{rank:05d}").unlink()
    assert said == ["rank 3", "rank 2", "rank 1", "rank 0"]


def test_who_suspects_another_is_named_behind_who_failed_by_itself(tmp_path) -> None:
    """The one that follows leaves its word first, and has the lower rank."""
    follower, own = Flight(0, str(tmp_path)), Flight(2, str(tmp_path))
    own.note("step 2")
    stamp(follower, at_ns=1, follows=True, suspect=Suspect(rank=1, why="it is gone"))
    note_cause(tmp_path, follower)
    assert read_cause(tmp_path).startswith("rank 1, ")
    stamp(own, at_ns=2, follows=False)
    note_cause(tmp_path, own)
    assert read_cause(tmp_path) == "rank 2, step 2"


def test_a_rank_ends_with_its_status_where_its_cause_cannot_be_read(tmp_path) -> None:
    (tmp_path / "script.py").write_text("1 / 0\n")
    (tmp_path / "exits").mkdir()
    (tmp_path / "failed-00001").write_text("damaged}")
    environment = os.environ | {
        "RANK": "0",
        "MOSAIC_FLIGHT_DIR": str(tmp_path),
        EXITS_VARIABLE: str(tmp_path / "exits"),
    }
    command = [sys.executable, "-c", f"{STAYS}main([{str(tmp_path / 'script.py')!r}])"]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=20)
    assert ended.returncode == 1 and "JSONDecodeError" in ended.stderr and "ZeroDivisionError" in ended.stderr


def test_a_job_comes_back_from_its_file(tmp_path) -> None:
    save_job(JOB, tmp_path)
    assert load_job(tmp_path) == JOB
    assert (plan_file(3, JOB), plan_file(2, JOB)) == ("plan.yaml", "plan-2-nodes.yaml")
    assert (JOB.size_word(2), replace(JOB, size_key="cluster.num_ranks").size_word(2)) == (
        "cluster.num_nodes=2",
        "cluster.num_ranks=16",
    )
    for damage in ("{}", "[]", "{", json.dumps({"form": "mpi"})):
        (tmp_path / "job.json").write_text(damage)
        with pytest.raises(ConfigError, match=r"job\.json"):
            load_job(tmp_path)


def test_srun_gets_words_and_the_last_node_fewer_ranks() -> None:
    command = srun_command(JOB, 17, 3, "plan.yaml", {"SLURM_CPUS_PER_TASK": "4"})
    assert command[0] == "srun" and {"--ntasks=17", "--nodes=3", "--cpus-per-task=4"} <= set(command)
    assert command[-5:] == ["-m", "a.b", "--lr=1; reboot", "--mosaic-plan", "plan.yaml"]  # one word stays one word
    command = srun_command(replace(JOB, form=Form.torchrun), 17, 3, "plan.yaml", {})
    assert {"--ntasks=3", "--ntasks-per-node=1"} <= set(command)
    words = command[command.index("megatron_mosaic.launch.slurm.node") + 1 :]
    told = {"MASTER_ADDR": "a", "MASTER_PORT": "1", "SLURM_STEP_NUM_NODES": "3"}
    counts = [torchrun_words(words, told | {"SLURM_NODEID": str(node)})[2] for node in range(3)]
    assert counts == ["--nproc-per-node=8", "--nproc-per-node=8", "--nproc-per-node=1"]


def test_ranks_are_told_what_was_predicted_of_their_plan() -> None:
    command = srun_command(replace(JOB, is_predicted=True), 17, 3, "a/plan-3-nodes.yaml", {})
    assert command[-4:] == ["--mosaic-plan", "a/plan-3-nodes.yaml"] + [
        "--mosaic-predicted",
        "a/plan-3-nodes.predicted.json",
    ]


def plan_of(world_size: int, **ranks: str) -> Plan:
    """Every module data parallel on its ranks."""
    sets = {name: RankSet.parse(text) for name, text in ranks.items()}
    return Plan(
        workload=DIGITS.name,
        world_size=world_size,
        global_batch_size=16,
        micro_batch_size=2,
        schedule=ScheduleChoice("1f1b"),
        modules={name: ModulePlan(ranks=one, layout=Layout(dp=len(one))) for name, one in sets.items()},
        cluster="h100_8x8",
    )


@pytest.mark.parametrize(
    ("plan", "per_node", "nodes", "idle"),
    [
        (plan_of(17, vision="0-7", llm="8-15", generator="16"), 8, 3, 7),
        (plan_of(24, vision="0-7", llm="8-15", generator="16"), 8, 3, 7),  # ranks without a module are idle, too
        (plan_of(16, vision="0-15", llm="0-7", generator="8-15"), 8, 2, 0),
        (plan_of(1, vision="0", llm="0", generator="0"), 8, 1, 7),
        (plan_of(3, vision="0", llm="1", generator="2"), 1, 3, 0),
    ],
)
def test_nodes_follow_from_the_ranks(plan, per_node, nodes, idle) -> None:
    allocation = allocate(plan, per_node)
    assert (allocation.num_nodes, allocation.num_idle) == (nodes, idle)


def test_a_dry_run_writes_all_and_submits_nothing(tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setenv("PATH", "")  # sbatch would not be found
    save_plan(plan_of(17, vision="0-7", llm="8-15", generator="16"), tmp_path / "p.yaml")
    words = ["submit", str(tmp_path / "p.yaml"), f"launcher.run_dir={tmp_path / 'run'}", "train.lr=3e-4", "--dry-run"]
    words += ["launcher=torchrun", "launcher.partition=gpu", "workload.training.format=bf16"]
    assert main([*words, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["nodes"], result["ranks"], result["idle_ranks"], result["job_id"]) == (3, 17, 7, None)
    assert "--lr=0.0003" in result["arguments"]
    found = {"--nodes=3", "--ntasks-per-node=1", "--cpus-per-task=8", "--gpus-per-node=8", "--partition=gpu"}
    assert found <= set(result["command"])
    run = Path(result["run_dir"])
    assert {path.name for path in run.iterdir()} == {
        *("plan.yaml", "plan.predicted.json", "job.json", "config.yaml", "version.txt", "submit.txt", "job.sbatch")
    }
    assert load_prediction(run / "plan.predicted.json", ["vision.0", "llm.0", "generator.0"]).step_s > 0
    assert load_job(run).is_predicted
    (tmp_path / "script.py").write_text("")
    own = [f"launcher.script={tmp_path / 'script.py'}", f"launcher.run_dir={tmp_path / 'own'}"]
    assert main([*(word for word in words if "run_dir" not in word), *own]) == 0
    assert not load_job(tmp_path / "own").is_predicted and not (tmp_path / "own" / "plan.predicted.json").exists()
    capsys.readouterr()
    assert "lr: 0.0003" in (run / "config.yaml").read_text() and "commit" in (run / "version.txt").read_text()
    assert main(words) == 2  # the directory has a run
    assert "a new directory" in capsys.readouterr().err
    del words[words.index("--dry-run")]
    assert main([*words, f"launcher.run_dir={tmp_path / 'other'}"]) == 2
    assert "no such command" in capsys.readouterr().err


def test_a_dry_run_prints_nodes_and_idle_gpus(tmp_path, capsys) -> None:
    """17 ranks on nodes of 8 H100s."""
    save_plan(plan_of(17, vision="0-7", llm="8-15", generator="16"), tmp_path / "p.yaml")
    words = [str(tmp_path / "p.yaml"), f"launcher.run_dir={tmp_path / 'run'}", "workload.training.format=bf16"]
    assert main(["submit", *words, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "3 nodes of 8 GPUs, 17 ranks, 7 idle GPUs" in " ".join(said.split())
    assert "--nodes=3" in said and "nothing was submitted" in said


@pytest.mark.parametrize(("word", "nearest"), [("train.nonsense=1", "train."), ("train.min_lrr=1e-5", "train.min_lr")])
def test_training_on_this_machine_refuses_the_same_words(tmp_path, capsys, word, nearest) -> None:
    save_plan(plan_of(1, vision="0", llm="0", generator="0"), tmp_path / "p.yaml")
    assert main(["train", str(tmp_path / "p.yaml"), "train.lr=3e-4", word]) == 2
    said = capsys.readouterr().err
    assert f"mosaic: {word.partition('=')[0]}\n" in said and f"did you mean {nearest}" in said


@pytest.mark.parametrize(
    ("word", "where"),
    [
        ("train.nonsense=1", "train.nonsense"),
        ("train.micro_batch_size=3", "train.micro_batch_size"),
        ("launcher.partition='gpu --wrap=reboot'", "launcher.partition"),
        ("launcher.sbatch=['--wrap=a b']", "launcher.sbatch"),
        ("launcher.min_nodes=2", "training"),  # another plan could not be made
        ("launcher.signal=KILL", "launcher.signal"),
        ("train.exit_signal=SIGUSR1", "--exit-signal"),
        ("train.load=elsewhere", "--load"),  # the job goes on from what it saved
        ("train.save=[a,b]", "b"),
        ("train.train_iters=100k", "--train-iters"),
        ("launcher.script=/none.py", "launcher.script"),
    ],
)
def test_what_cannot_be_submitted_is_refused_in_words(tmp_path, capsys, word, where) -> None:
    save_plan(plan_of(17, vision="0-7", llm="8-15", generator="16"), tmp_path / "p.yaml")
    words = ["submit", str(tmp_path / "p.yaml"), "--dry-run", word, f"launcher.run_dir={tmp_path / 'run'}"]
    assert main(words) == 2
    assert where in capsys.readouterr().err.splitlines()[0]
    assert not (tmp_path / "run" / "plan.yaml").exists()


def test_fewer_nodes_may_be_asked_for_and_not_more(tmp_path) -> None:
    section = compose_sections(["launcher.min_nodes=1", "cluster=h100_8x8"]).launcher
    allocation = allocate(plan_of(17, vision="0-7", llm="8-15", generator="16"), 8)
    assert "--nodes=1-3" in sbatch_command(section, allocation, 0, tmp_path)
    section = compose_sections(["launcher.min_nodes=4", "cluster=h100_8x8"]).launcher
    with pytest.raises(ConfigError, match="at most 3"):
        sbatch_command(section, allocation, 0, tmp_path)
