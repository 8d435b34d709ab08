"""Megatron's arguments as a mapping, the group `train` of the configuration: `lr: 3e-4` is `--lr=3e-4`.

A key is an argument's name as scripts see it (`train_iters`, `exit_signal_handler`). true sets what takes no value;
null leaves an argument out, and so does false, but where an argument switches something off: `bias_gelu_fusion: false`.
"""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from megatron_mosaic.errors import ConfigError
from megatron_mosaic.runtime.flags.command_line import AddArguments, parser_of

GROUP = "train."
_NUM_SUGGESTIONS = 3
_WORD = re.compile(r"train\.([A-Za-z_]\w*)=(.*)", re.ASCII | re.DOTALL)


def split_words(words: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """(the words `train.KEY=VALUE` as a mapping, all others)."""
    values: dict[str, Any] = {}
    others = []
    for word in words:
        if not word.startswith(GROUP):
            others.append(word)
            continue
        match = _WORD.fullmatch(word)
        if match is None or match[1] in values:
            got = f"{word[:200]!r}, a second time" if match else repr(word[:200])
            raise ConfigError(word[:80], got=got, expected="train.KEY=VALUE, each key once", fix="correct it")
        values[match[1]] = _read(match[1], match[2])
    return values, others


def flags_of(values: Mapping[str, Any], add_arguments: AddArguments) -> list[str]:
    """The arguments as words. ConfigError for a key that is no argument's, or a value that cannot be one's."""
    parser = parser_of(add_arguments)
    by_dest: dict[str, list[argparse.Action]] = {}
    for action in parser._actions:
        by_dest.setdefault(action.dest, []).append(action)
    words: list[str] = []
    for key, value in values.items():
        if key not in by_dest:
            raise _unknown_key(key, list(by_dest))
        if value is not None:
            words += _words(by_dest[key], key, value)
    return words


def refuse_twice(values: Mapping[str, Any], typed: Mapping[str, Any]) -> None:
    """ConfigError if an argument is given as a flag, too."""
    for key, value in values.items():
        if value is not None and key in typed:
            flag = f"--{key.replace('_', '-')}"
            raise ConfigError(f"{GROUP}{key}", got=f"{flag} beside it", expected="one of the two", fix="leave one out")


def _words(actions: Sequence[argparse.Action], key: str, value: Any) -> list[str]:
    """One argument's words. An argument with two actions has one that sets and one that clears."""
    first = actions[0]
    if isinstance(first, argparse.BooleanOptionalAction):
        wanted = [option for option in first.option_strings if option.startswith("--no-") is not _boolean(key, value)]
        return wanted[:1]
    if first.nargs == 0:
        flag = _boolean(key, value)
        return [action.option_strings[0] for action in actions if action.const is flag][:1]
    if isinstance(value, (list, tuple)):
        return [first.option_strings[0], *map(_text, value)] if value else []
    if isinstance(value, Mapping):
        raise ConfigError(f"{GROUP}{key}", got=value, expected="a value, or a list of values", fix="correct it")
    # as one word: a value may begin with a dash
    flag_name = first.option_strings[0]
    return [f"{flag_name}={_text(value)}"]


def _boolean(key: str, value: Any) -> bool:
    if isinstance(value, bool):
        return value
    raise ConfigError(f"{GROUP}{key}", got=value, expected="true, false or null", fix="correct it")


def _text(value: Any) -> str:
    return str(value)


def _read(key: str, text: str) -> Any:
    """true, false, null and lists by their YAML; everything else as it stands."""
    if text[:1] not in "[\"'" and text not in ("true", "false", "null"):
        return text
    try:
        return yaml.load(text, yaml.BaseLoader) if text[:1] in "[\"'" else yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{GROUP}{key}", got=text[:200], expected="a value, or [a,b]", fix="correct it") from error


def _unknown_key(key: str, known: Sequence[str]) -> ConfigError:
    close = difflib.get_close_matches(key, known, _NUM_SUGGESTIONS) or difflib.get_close_matches(key, known, 1, 0.0)
    return ConfigError(
        f"{GROUP}{key}",
        got="a key that no argument has",
        expected="an argument of Megatron's parser or of the script, with _ for -",
        fix=f"did you mean {' or '.join(GROUP + name for name in close)}?",
    )
