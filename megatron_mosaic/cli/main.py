"""Arguments of the `mosaic` command, and its exit status: 0 done, 1 the answer is no, 2 the input is wrong."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import platform
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Never

from megatron_mosaic import __version__
from megatron_mosaic.errors import ConfigError, MosaicError, RankFailure

DONE, NO, WRONG_INPUT = 0, 1, 2
RUNS_ON = ("torch", "megatron-core")
TERMINATED, INTERRUPTED = 128 + signal.SIGTERM, 128 + signal.SIGINT

# Subcommand -> module with `main(arguments) -> exit status`, imported when asked for: some of them import torch.
COMMANDS = {
    "plan": "megatron_mosaic.cli.plan",
    "compare": "megatron_mosaic.cli.compare",
    "show": "megatron_mosaic.cli.show",
    "simulate": "megatron_mosaic.cli.simulate",
    "calibrate": "megatron_mosaic.cli.calibrate",
    "check": "megatron_mosaic.cli.check",
    "train": "megatron_mosaic.cli.train",
    "submit": "megatron_mosaic.cli.submit",
    "validate": "megatron_mosaic.cli.validate",
    "report": "megatron_mosaic.cli.report",
    "import": "megatron_mosaic.cli.import_model",
    "convert": "megatron_mosaic.cli.convert",
    "completion": "megatron_mosaic.cli.completion",
}


class _Parser(argparse.ArgumentParser):
    """Errors of argparse in the form of all others."""

    def error(self, message: str) -> Never:
        raise ConfigError(
            f"{self.prog}: arguments", got=message, expected=" ".join(self.format_usage().split()), fix="see --help"
        )


class _Version(argparse.Action):
    """Prints versions and leaves. Nothing is imported for it, so that it answers where torch is broken or missing."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> Never:
        print(f"mosaic {__version__} (Python {platform.python_version()}, {', '.join(map(_name_version, RUNS_ON))})")
        parser.exit()


def _name_version(package: str) -> str:
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return f"no {package}"


def build_parser() -> argparse.ArgumentParser:
    """The parser of all subcommands. Overrides are plain words: model=NAME cluster=NAME group.key=value."""
    parser = _Parser(prog="mosaic", description=__doc__, allow_abbrev=False)
    parser.add_argument("--version", action=_Version, nargs=0, help="print the versions of mosaic and what it runs on")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)

    def add(name: str, text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        command.add_argument(
            "--json", action="store_true", help="print one JSON object on stdout and nothing else there"
        )
        return command

    plan = add("plan", "search for the fastest plan and write it")
    plan.add_argument("--out", metavar="PLAN", help="file to write the plan to; without it, the plan is printed")
    plan.add_argument("--predicted", metavar="FILE", help="write what a run of it says beside what it measures")
    plan.add_argument("--like", metavar="PLAN", help="for the model, batch, cluster and training of this plan")
    plan.add_argument("--time-budget", type=float, metavar="S", help="the best plan found in so many seconds")
    compare = add("compare", "the plan beside what other systems would do, on the same cost model")
    show = add("show", "modules, rank map, schedule and memory of a plan")
    simulate = add("simulate", "the predicted timeline of a plan")
    simulate.add_argument("--trace", metavar="FILE", help="write Chrome-trace JSON, for Perfetto")
    simulate.add_argument("--html", metavar="FILE", help="write the page of `mosaic report --no-search`")
    simulate.add_argument(
        "--draws",
        type=int,
        default=256,
        metavar="N",
        help="batches to draw where the model has histograms of its data (default 256; 0: none)",
    )
    calibrate = add("calibrate", "measure this machine and write its profile")
    calibrate.add_argument("--out", metavar="FILE", help="file to write (default: $MOSAIC_PROFILE, else the cache)")
    calibrate.add_argument(
        "--gpu-type",
        metavar="NAME",
        help="measure the GPU instead: a file for cluster.gpu=FILE.yaml, with NAME's datasheet",
    )
    calibrate.add_argument("--from-run", metavar="DIR", help="correct the profile by what this run measured")
    check = add("check", "run a plan on local CPU processes and compare with a single process")
    check.add_argument("--steps", type=int, default=3, metavar="N", help="training steps (default 3)")
    check.add_argument(
        "--script", metavar="SCRIPT", help="a Megatron pretrain script, against itself on one process without a plan"
    )
    check.add_argument("--model", metavar="NAME", help="model to run (default: the plan's workload)")
    train = add("train", "train the reference model under a plan, through Megatron's own pretrain()")
    submit = add("submit", "a plan as a Slurm job that goes on after its time limit: [PLAN] OVERRIDES")
    submit.add_argument("--dry-run", action="store_true", help="write the run directory, print all, submit nothing")
    validate = add("validate", "the cost model against published measurements")
    validate.add_argument("--data", metavar="DIR", help="folder of CSV files")
    validate.add_argument("--plot", metavar="FILE", help="write predicted over measured as a picture (matplotlib)")
    report = add("report", "a plan, its prediction and a run of it as one HTML page that needs no network")
    report.add_argument("--run", metavar="DIR", help="what `mosaic train --report DIR` or a submitted job measured")
    report.add_argument("--out", metavar="FILE.html", help="file to write (default: beside the plan)")
    report.add_argument("--no-search", dest="search", action="store_false", help="leave the searched plans out")
    importing = add("import", "a model file from a Hugging Face config.json or a list of Megatron arguments")
    importing.add_argument("source", metavar="SOURCE", help="hf:DIR/config.json or megatron:ARGS.txt")
    importing.add_argument("--out", metavar="MODEL.yaml", help="file to write; without it, the model is printed")
    converting = add("convert", "weights of a stock script's checkpoint for plans of several modules, and back")
    converting.add_argument(
        "source", metavar="SOURCE", help="directory of --save: format torch, or a plan's torch_dist"
    )
    converting.add_argument("target", metavar="TARGET", help="directory for --load, in the other format")
    completion = commands.add_parser("completion", help="print a script that makes bash complete words")
    completion.add_argument("shell", choices=("bash",), help='eval "$(mosaic completion bash)"')
    for command in (show, simulate, check, train, report):
        command.add_argument("plan", metavar="PLAN", help="plan file")
    for command in (plan, compare, show, simulate, calibrate, submit, report):
        command.add_argument("overrides", nargs="*", metavar="OVERRIDE", help="e.g. cluster=h100_8x8 search.max_tp=4")
        command.add_argument("--config-dir", metavar="DIR", help="folder of your own model/*.yaml and cluster/*.yaml")
    for command in (simulate, check, train, report):
        command.add_argument(
            "--mosaic-schedule",
            metavar="FILE",
            help="text of the schedule of training steps",
        )
    train.add_argument("--log", metavar="FILE", help="write Megatron's own output there instead of showing it")
    train.add_argument("--report", metavar="DIR", help="keep losses and timeline there, for `mosaic report --run DIR`")
    train.add_argument("--trace", metavar="FILE", help="write predicted and measured timeline as Chrome-trace JSON")
    for command in (plan, compare, simulate, calibrate, train, submit, report):
        command.add_argument("--profile", metavar="FILE", help="profile of cluster=local (default: that of calibrate)")
    return parser


def parse_arguments(words: Sequence[str]) -> argparse.Namespace:
    """Parsed words. Overrides may stand between options; `train` and `check` hand unknown words on to Megatron."""
    parser = build_parser()
    arguments, rest = parser.parse_known_args(words)
    if arguments.command in ("train", "check"):
        return argparse.Namespace(**vars(arguments), megatron_args=rest)
    if hasattr(arguments, "overrides"):
        arguments.overrides.extend(word for word in rest if not word.startswith("-"))
        rest = [word for word in rest if word.startswith("-")]
    if rest:
        parser.error(f"unknown: {' '.join(rest)}")
    if folder := getattr(arguments, "config_dir", None):
        from megatron_mosaic.config import resolve_names  # costs the import of pydantic and yaml

        arguments.overrides[:] = resolve_names(arguments.overrides, Path(folder))
    return arguments


def main(words: Sequence[str] | None = None) -> int:
    """Run one subcommand; the exit status. SIGTERM ends it with 143, an interrupt with 130, temporary files removed."""
    words = sys.argv[1:] if words is None else words
    with _sigterm_as_exit():
        try:
            return _run(words)
        except KeyboardInterrupt:
            print("mosaic: interrupted", file=sys.stderr)
            return INTERRUPTED


def _run(words: Sequence[str]) -> int:
    try:
        arguments = parse_arguments(words)
        return _command(arguments.command)(arguments)
    except MosaicError as error:
        return _refuse(error, words)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("", "megatron_mosaic"):
            raise
        return _refuse(_missing(package), words)
    except BrokenPipeError:
        sys.stderr.close()  # the reader of our output went away, e.g. `mosaic show | head`
        return DONE


def _refuse(error: MosaicError, words: Sequence[str]) -> int:
    """Print the error; the exit status that it stands for."""
    print(f"mosaic: {error}", file=sys.stderr)
    if "--json" in words:
        print(json.dumps(error.as_dict()))
    is_answer = isinstance(error, RankFailure) or getattr(error, "is_answer", False)
    return NO if is_answer else WRONG_INPUT


def _missing(package: str) -> ConfigError:
    """For an environment that has the planner's dependencies alone, or not all of them."""
    return ConfigError(
        "mosaic: the environment",
        got=f"no package {package}",
        expected="what this command imports: plan, show, simulate, compare, report, import and validate need no torch",
        fix="pip install megatron-mosaic without --no-deps",
    )


@contextlib.contextmanager
def _sigterm_as_exit() -> Iterator[None]:
    """SIGTERM unwinds the stack, so that `with` blocks clean up. Only the main thread may set handlers."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(*_: object) -> Never:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one would interrupt the clean-up
        sys.exit(TERMINATED)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


def _command(name: str) -> Callable[[argparse.Namespace], int]:
    module = COMMANDS[name]
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module:
            raise
        found = None
    command: Callable[[argparse.Namespace], int] | None = getattr(found, "main", None)
    if command is None:
        raise ConfigError(
            f"mosaic {name}", got="a command that is not built yet", expected="a built command", fix="see mosaic --help"
        )
    return command
