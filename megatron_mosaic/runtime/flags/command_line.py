"""Command lines read with the table: the words that Megatron's parser takes, in a tenth of a second.

Wrong words (unknown, abbreviated, of another type, without a value) are refused here, before a rank starts.
"""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Never

from megatron_mosaic.errors import ConfigError
from megatron_mosaic.runtime.flags.mosaic import add_mosaic_arguments
from megatron_mosaic.runtime.flags.table import TYPES, Argument, load_arguments

AddArguments = Callable[[argparse.ArgumentParser], argparse.ArgumentParser]

ACTIONS: Mapping[str, Any] = {
    "store": "store",
    "true": "store_true",
    "false": "store_false",
    "boolean": argparse.BooleanOptionalAction,
    "help": "store_true",  # Megatron's parser prints it
}

# What holds under a plan whatever Megatron's default is: gradients are sums, divided once by the global token count,
# and every rank reads the whole batch in order.
UNDER_A_PLAN: Mapping[str, object] = {"calculate_per_token_loss": True, "dataloader_type": "external"}

# Megatron refuses two of these together; a default of ours gives way to what is typed.
GIVES_WAY = (
    ("lr_warmup_iters", "lr_warmup_fraction"),
    ("lr_warmup_samples", "lr_warmup_fraction"),
    ("train_samples", "train_iters"),
)
_KINDS: Mapping[Any, str] = {int: "a whole number", float: "a number"}
_NUM_SUGGESTIONS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class CommandLine:
    """What was typed, and what holds where nothing was. Both by `dest`."""

    typed: Mapping[str, Any]
    defaults: Mapping[str, Any]

    @property
    def values(self) -> argparse.Namespace:
        """The arguments as a script sees them."""
        return argparse.Namespace(**{**self.defaults, **self.typed, **emptied_by(self.typed)})


def emptied_by(typed: Mapping[str, Any]) -> dict[str, None]:
    """The defaults that exclude what was typed, empty."""
    return {ours: None for theirs, ours in GIVES_WAY if theirs in typed and ours not in typed}


def read_command_line(words: Sequence[str], add_arguments: AddArguments, defaults: Mapping[str, object]) -> CommandLine:
    """The words read as Megatron's parser would, with a script's arguments and defaults, and mosaic's own arguments.

    ConfigError if a word is wrong. `add_arguments` of a script is asked once in the life of the process.
    """
    parser = parser_of(add_arguments)
    typed = argparse.Namespace(**dict.fromkeys((action.dest for action in parser._actions), _NOT_TYPED))
    try:
        _, unknown = parser.parse_known_args(list(words), typed)
    except argparse.ArgumentError as error:
        raise _wrong_value(parser, error) from error
    if unknown:
        raise _unknown_word(parser, unknown[0])
    return CommandLine(
        typed={dest: value for dest, value in vars(typed).items() if value is not _NOT_TYPED},
        defaults={**_defaults_of(add_arguments), **UNDER_A_PLAN, **defaults},
    )


@cache
def parser_of(add_arguments: AddArguments) -> _Parser:
    """A parser of Megatron's arguments, a script's and mosaic's own."""
    parser = _Parser(allow_abbrev=False, add_help=False, exit_on_error=False)
    for argument in load_arguments():
        _add(parser, argument)
    add_mosaic_arguments(add_arguments(parser))
    return parser


@cache
def _defaults_of(add_arguments: AddArguments) -> Mapping[str, Any]:
    return vars(parser_of(add_arguments).parse_args([]))


_NOT_TYPED = object()


class _Parser(argparse.ArgumentParser):
    """argparse prints nothing and leaves no process."""

    def error(self, message: str) -> Never:
        raise ConfigError("arguments", got=message, expected="arguments of Megatron and of mosaic", fix="correct them")


def _add(parser: argparse.ArgumentParser, argument: Argument) -> None:
    kind = TYPES[argument.type]
    takes: dict[str, Any] = {"dest": argument.dest, "default": argument.default, "action": ACTIONS[argument.action]}
    if argument.takes_value:
        takes |= {"type": kind, "nargs": argument.nargs}
    if argument.choices:
        takes["choices"] = tuple(kind(choice) if kind else choice for choice in argument.choices)
    # argparse makes the --no- of a boolean itself
    flags = [f for f in argument.flags if argument.action != "boolean" or not f.startswith("--no-")]
    parser.add_argument(*flags, **takes)


def _wrong_value(parser: argparse.ArgumentParser, error: argparse.ArgumentError) -> ConfigError:
    flags = (error.argument_name or "arguments").split("/")
    action = next((a for a in parser._actions if set(flags) & set(a.option_strings)), None)
    expected = _expectation(action) if action is not None else "arguments of Megatron and of mosaic"
    return ConfigError(flags[0], got=error.message, expected=expected, fix="correct it")


def _expectation(action: argparse.Action) -> str:
    """Which values the argument takes, in words."""
    if action.nargs == 0:
        return "no value: it is set or left out"
    one = _KINDS.get(action.type, "a word")
    if action.choices:
        one = f"one of {', '.join(map(str, action.choices))}"
    many: dict[Any, str] = {"+": "one value or more, each ", "*": "any number of values, each ", None: ""}
    return many.get(action.nargs, f"{action.nargs} values, each ") + one


def _unknown_word(parser: argparse.ArgumentParser, word: str) -> ConfigError:
    """A flag that nobody has, or a word that belongs to no flag."""
    if not word.startswith("-"):
        return ConfigError(
            word, got="a word that belongs to no argument", expected="--flag value", fix="put its flag before it"
        )
    flag = word.partition("=")[0]
    known = [option for action in parser._actions for option in action.option_strings]
    longer = [option for option in known if option.startswith(flag)][:_NUM_SUGGESTIONS]
    close = longer or difflib.get_close_matches(flag, known, _NUM_SUGGESTIONS)
    return ConfigError(
        flag,
        got="an argument that nobody has",
        expected="an argument of Megatron's parser, of the reference model or of mosaic, in full",
        fix=f"did you mean {' or '.join(close)}?" if close else "correct its spelling, or leave it out",
    )
