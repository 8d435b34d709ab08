"""The words of every subcommand of `mosaic`. Overrides are plain words: model=NAME cluster=NAME group.key=value."""

from __future__ import annotations

import argparse
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Never

from megatron_mosaic import __version__
from megatron_mosaic.errors import ConfigError

ABOUT = "Plan and run the training of multimodal models. Exit status: 0 done, 1 the answer is no, 2 the input is wrong."
RUNS_ON = ("torch", "megatron-core")


class Parser(argparse.ArgumentParser):
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
    """The parser of all subcommands."""
    parser = Parser(prog="mosaic", description=ABOUT, allow_abbrev=False)
    parser.add_argument("--version", action=_Version, nargs=0, help="print the versions of mosaic and what it runs on")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)

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
    add("compare", "the plan beside what other systems would do, on the same cost model")
    add("show", "modules, rank map, schedule and memory of a plan")
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
    add("train", "train the reference model under a plan, through Megatron's own pretrain()")
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
    _add_shared(commands.choices)
    return parser


def _add_shared(of: Mapping[str, argparse.ArgumentParser]) -> None:
    """What several subcommands take. `of`: name -> its parser."""
    for name in ("show", "simulate", "check", "train", "report"):
        of[name].add_argument("plan", metavar="PLAN", help="plan file")
    for name in ("plan", "compare", "show", "simulate", "calibrate", "submit", "report"):
        of[name].add_argument("overrides", nargs="*", metavar="OVERRIDE", help="e.g. cluster=h100_8x8 search.max_tp=4")
        of[name].add_argument("--config-dir", metavar="DIR", help="folder of your own model/*.yaml and cluster/*.yaml")
    for name in ("simulate", "check", "train", "report"):
        of[name].add_argument("--mosaic-schedule", metavar="FILE", help="text of the schedule of training steps")
    train = of["train"]
    train.add_argument("--log", metavar="FILE", help="write Megatron's own output there instead of showing it")
    train.add_argument("--report", metavar="DIR", help="keep losses and timeline there, for `mosaic report --run DIR`")
    train.add_argument("--trace", metavar="FILE", help="write predicted and measured timeline as Chrome-trace JSON")
    for name in ("plan", "compare", "simulate", "calibrate", "train", "submit", "report"):
        of[name].add_argument("--profile", metavar="FILE", help="profile of cluster=local (default: that of calibrate)")
