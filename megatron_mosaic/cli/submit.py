"""`mosaic submit`: a plan as a Slurm job that goes on after its time limit, with all it needs in one directory."""

from __future__ import annotations

import argparse
import shlex
import shutil
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from megatron_mosaic.any2any.arguments import add_any2any_arguments, judge_words, read_words, refuse_given
from megatron_mosaic.cli.output import print_json, print_note, print_table
from megatron_mosaic.cli.plan import search_plan
from megatron_mosaic.cli.planned import Planned, apply_overrides
from megatron_mosaic.cli.predicted import build_prediction, list_unpriced
from megatron_mosaic.config import Task, load_task
from megatron_mosaic.cost_model.simulate import simulate
from megatron_mosaic.errors import ConfigError, MosaicError, PlanError
from megatron_mosaic.launch.slurm.job import PLAN_FILE, Job, prediction_file, save_job
from megatron_mosaic.launch.slurm.submission import SCRIPT, Allocation, allocate, grace_s, sbatch_command, submit
from megatron_mosaic.plan import Plan, RankSet, validate_plan
from megatron_mosaic.plan.cluster import GpuClusterSection
from megatron_mosaic.plan.plan_file import load_plan, save_plan
from megatron_mosaic.plan.workload_file import format_workload
from megatron_mosaic.runtime.flags.command_line import CommandLine, read_command_line
from megatron_mosaic.runtime.flags.judge import Purpose
from megatron_mosaic.runtime.flags.words import flags_of, split_words
from megatron_mosaic.runtime.telemetry.prediction import format_prediction

MODEL_FILE = "model.yaml"
_REFERENCE, _REFERENCE_SCRIPT = "any2any-digits", "megatron_mosaic.any2any.pretrain"
# By the job to its ranks: it tells them to save, and goes on from what they saved
_GIVEN = ("mosaic_plan", "mosaic_report", "mosaic_predicted", "exit_signal", "exit_signal_handler", "load")
_SAVE_INTERVAL = 1000  # steps, where nobody says
_OF_THE_PLAN = ("train.", "train=", "launcher.", "launcher=")  # words that no other plan depends on


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """What the ranks run. `num_steps`: in all; 0 where only the script knows. `model`: text of a model file they read,
    or empty. `unpriced`: flags of which the cost model knows nothing."""

    script: tuple[str, ...]
    arguments: tuple[str, ...]
    num_steps: int
    checkpoints: str
    model: str
    unpriced: tuple[str, ...]


def main(arguments: argparse.Namespace) -> int:
    """Validate, write the run directory, submit it or print what would be submitted."""
    paths = [word for word in arguments.overrides if "=" not in word]
    overrides = [word for word in arguments.overrides if "=" in word]
    flags_of(split_words(overrides)[0], add_any2any_arguments)  # it knows names close to a wrong key
    if len(paths) > 1:
        raise ConfigError("mosaic submit", got=" ".join(paths), expected="one plan file", fix="leave out the others")
    plan = load_plan(paths[0]) if paths else _search(overrides, arguments.profile)
    planned = apply_overrides(plan, overrides)
    validate_plan(planned.plan, planned.workload)
    section = planned.sections.launcher
    allocation = allocate(planned.plan, _ranks_per_node(planned))
    directory = Path(section.run_dir or f"runs/{planned.plan.workload}-{time.strftime('%Y%m%d-%H%M%S')}").resolve()
    if section.min_nodes:  # the job will have to make a plan: what that needs must be there
        planned.build_task(arguments.profile)
    training = _training(planned, directory)
    command = sbatch_command(section, allocation, _num_gpus(planned, allocation), directory)
    # A script of the user's own knows no --mosaic-predicted
    predicted = "" if section.script else _predict(planned, training, arguments.profile)
    job = _job(planned, allocation, training, directory, (overrides, arguments.profile, bool(predicted)))
    _write(directory, planned, job, (training.model, predicted), command)
    for note in planned.notes:
        print_note(note)
    job_id = None if arguments.dry_run else submit(command)
    result: dict[str, Any] = {
        "job_id": job_id,
        "run_dir": str(directory),
        "nodes": allocation.num_nodes,
        "ranks": allocation.num_ranks,
        "idle_ranks": allocation.num_idle,
        "command": command,
        "script": list(training.script),
        "arguments": list(training.arguments),
    }
    if arguments.json:
        print_json(result)
    else:
        _print(planned, allocation, result)
    return 0


def _search(overrides: Sequence[str], profile: str | None) -> Plan:
    def load(*words: str) -> Task:
        return load_task([*overrides, *words], profile_path=profile)

    return search_plan(load(), load)[0]


def _ranks_per_node(planned: Planned) -> int:
    given, cluster = planned.sections.launcher.ranks_per_node, planned.cluster
    if given:
        return given
    if cluster is None:
        raise PlanError(
            "cluster",
            got="nothing in the plan or on the command line",
            expected="how many GPUs a node has",
            fix="add cluster=NAME, or launcher.ranks_per_node=N",
        )
    return cluster.gpus_per_node if isinstance(cluster, GpuClusterSection) else cluster.num_ranks


def _num_gpus(planned: Planned, allocation: Allocation) -> int:
    given = planned.sections.launcher.gpus_per_node
    if given is not None:
        return given
    return allocation.ranks_per_node if isinstance(planned.cluster, GpuClusterSection) else 0


def _training(planned: Planned, directory: Path) -> Training:
    """The ranks' script and arguments, judged as far as that is possible without them."""
    plan, script = planned.plan, planned.sections.launcher.script
    if script and not Path(script).is_file():
        raise ConfigError("launcher.script", got=script, expected="a Megatron pretrain script", fix="correct it")
    add_arguments = _no_more if script else add_any2any_arguments
    values = {key: value for key, value in planned.sections.train.items() if value is not None}
    typed = read_command_line(flags_of(values, add_arguments), add_arguments, {}).typed
    refuse_given(typed, _GIVEN, "mosaic submit")
    checkpoints = str(Path(typed.get("save") or directory / "checkpoints").resolve())
    given: dict[str, Any] = {"exit_signal_handler": True, "save": checkpoints, "load": checkpoints}
    given["save_interval"] = typed.get("save_interval", _SAVE_INTERVAL)
    model = ""
    if not script and plan.workload != _REFERENCE and "workload" not in typed:
        model, given["workload"] = format_workload(planned.workload), str(directory / MODEL_FILE)
    flags = flags_of(values | given, add_arguments)
    args = read_command_line(flags, add_arguments, {}).values
    words = ("-m", "megatron_mosaic.run", str(Path(script).resolve())) if script else ("-m", _REFERENCE_SCRIPT)
    unpriced: tuple[str, ...] = ()
    if not script:
        line = _judge(plan, values | given, model)
        args, unpriced = line.values, list_unpriced(line)
        flags.append(f"--mosaic-report={directory / 'report'}")
    return Training(
        script=words,
        arguments=tuple(flags),
        num_steps=args.train_iters or (args.train_samples or 0) // plan.global_batch_size,
        checkpoints=checkpoints,
        model=model,
        unpriced=unpriced,
    )


def _no_more(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Of a script whose own arguments nobody knows here."""
    return parser


def _judge(plan: Plan, values: Mapping[str, Any], model: str) -> CommandLine:
    """The reference model's arguments. ConfigError, PlanError for what its ranks would refuse."""
    with tempfile.TemporaryDirectory(prefix="mosaic-submit-") as scratch:
        if model:  # its file is not written yet
            file = Path(scratch) / MODEL_FILE
            file.write_text(model, encoding="utf-8")
            values = {**values, "workload": str(file)}
        line = read_words(flags_of(values, add_any2any_arguments))
        for note in judge_words(line, plan, Purpose.train)[1]:
            print_note(note)
    return line


def _predict(planned: Planned, training: Training, profile: str | None) -> str:
    """Text of the file that says what is predicted; empty, with a note, where there is no prediction."""
    if training.unpriced:
        print_note(f"no prediction: the cost model knows nothing of {', '.join(training.unpriced)}")
        return ""
    try:
        task = planned.build_task(profile)
        validate_plan(planned.plan, task.workload, task.cluster)
        simulation = simulate(planned.plan, task.cost_model())
    except MosaicError as error:
        print_note(f"no prediction: {error.where}: got {error.got}, expected {error.expected}")
        return ""
    return format_prediction(build_prediction(planned.plan, task, simulation))


def _job(
    planned: Planned,
    allocation: Allocation,
    training: Training,
    directory: Path,
    asked: tuple[Sequence[str], str | None, bool],
) -> Job:
    overrides, profile, is_predicted = asked
    words = ["--like", str(directory / PLAN_FILE)]
    words += [word for word in overrides if not word.lstrip("+").startswith(_OF_THE_PLAN)]
    words += ["--profile", str(Path(profile).resolve())] if profile else []
    on_gpus = isinstance(planned.cluster, GpuClusterSection)
    words += [f"cluster.gpus_per_node={allocation.ranks_per_node}"] if on_gpus else []
    section = planned.sections.launcher
    return Job(
        form=section.form,
        num_nodes=allocation.num_nodes,
        ranks_per_node=allocation.ranks_per_node,
        script=training.script,
        arguments=training.arguments,
        plan_words=tuple(words),
        size_key="cluster.num_nodes" if on_gpus else "cluster.num_ranks",
        num_steps=training.num_steps,
        checkpoints=training.checkpoints,
        max_restarts=section.max_restarts,
        grace_s=grace_s(section),
        is_predicted=is_predicted,
    )


def _write(directory: Path, planned: Planned, job: Job, texts: tuple[str, str], command: Sequence[str]) -> None:
    """All that the job needs: plan, resolved configuration, arguments, version, batch script, and model and prediction,
    which are `texts`, where these are not empty."""
    if (directory / PLAN_FILE).exists():
        raise ConfigError(
            "launcher.run_dir", got=str(directory), expected="a new directory", fix="choose another: it has a run"
        )
    try:
        directory.mkdir(parents=True, exist_ok=True)
        save_plan(planned.plan, directory / PLAN_FILE)
        save_job(job, directory)
        for name, text in zip((MODEL_FILE, prediction_file(directory / PLAN_FILE).name), texts, strict=True):
            if text:
                (directory / name).write_text(text, encoding="utf-8")
        resolved = planned.sections.model_dump(mode="json")
        resolved["train"] = {key: value for key, value in resolved["train"].items() if value is not None}
        (directory / "config.yaml").write_text(yaml.safe_dump(resolved, sort_keys=False), encoding="utf-8")
        (directory / "version.txt").write_text(_describe_version(), encoding="utf-8")
        (directory / "submit.txt").write_text(shlex.join(command) + "\n", encoding="utf-8")
        shutil.copy(SCRIPT, directory / SCRIPT.name)
    except OSError as error:
        raise ConfigError(
            str(directory), got=str(error), expected="a writable directory", fix="choose another"
        ) from error


def _describe_version() -> str:
    """The package, and the commit of the sources it runs from, if git knows them."""
    source = Path(__file__).resolve().parents[1]
    words = ["git", "-C", str(source), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        asked = subprocess.run(words, capture_output=True, text=True, check=False)
        commit = asked.stdout.strip() if asked.returncode == 0 else "not under git"
    except FileNotFoundError:
        commit = "no git"
    return f"megatron-mosaic {version('megatron-mosaic')}\ncommit {commit}\n"


def _print(planned: Planned, allocation: Allocation, result: Mapping[str, Any]) -> None:
    plan, per_node = planned.plan, allocation.ranks_per_node
    what = "GPUs" if isinstance(planned.cluster, GpuClusterSection) else "ranks"
    rows = [
        (name, str(module.layout), str(module.ranks), str(RankSet.of({rank // per_node for rank in module.ranks})))
        for name, module in plan.modules.items()
    ]
    title = f"{plan.workload}: {allocation.num_nodes} nodes of {per_node} {what}, {allocation.num_ranks} ranks, "
    title += f"{allocation.num_idle} idle {what}"
    print_table(title, ("module", "layout", "ranks", "nodes"), rows)
    print(f"run directory  {result['run_dir']}")
    print(f"ranks run      python {shlex.join([*result['script'], *result['arguments']])} --mosaic-plan plan.yaml")
    print(f"command        {shlex.join(result['command'])}")
    if result["job_id"] is None:
        print(f"\n{SCRIPT.read_text(encoding='utf-8')}\nnothing was submitted")
    else:
        print(f"job            {result['job_id']}")
