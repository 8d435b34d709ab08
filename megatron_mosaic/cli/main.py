"""Arguments of the `mosaic` command, and its exit status: 0 done, 1 the answer is no, 2 the input is wrong."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Never

from megatron_mosaic.cli.words import build_parser
from megatron_mosaic.errors import ConfigError, MosaicError, RankFailure

DONE, NO, WRONG_INPUT = 0, 1, 2
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
