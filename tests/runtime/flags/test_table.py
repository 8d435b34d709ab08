"""The table against Megatron's own parser: every action has its row, and every row its action."""

import argparse
import enum
from collections import Counter
from pathlib import Path

import megatron.training.arguments as megatron_arguments
import pytest

from megatron_mosaic.any2any.arguments import read_words
from megatron_mosaic.errors import ConfigError
from megatron_mosaic.runtime.flags.command_line import CommandLine
from megatron_mosaic.runtime.flags.judge import Purpose, judge
from megatron_mosaic.runtime.flags.table import Verdict, arguments_by_dest, load_arguments

NUM_ACTIONS = 808  # of megatron-core 0.19.2, printed below
ACTION_OF = {
    "_StoreAction": "store",
    "_StoreTrueAction": "true",
    "_StoreFalseAction": "false",
    "BooleanOptionalAction": "boolean",
    "_HelpAction": "help",
}
# Megatron's functions that read a value -> the table's; for others their name. Values of the last are refused anyway.
TYPE_OF = {None: "", "str": "", "enum_type_handler": "", "type": ""}
LITERALS = ("moe_freq_type", "no_rope_freq_type", "la_freq_type", "tuple_type", "_parse_cuda_graph_modules_arg")
FACTS = {"experts"}
HELD = read_words([]).defaults  # what holds where nothing is typed


def megatron_parser() -> argparse.ArgumentParser:
    return megatron_arguments.add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))


def plain(value):
    return value.name if isinstance(value, enum.Enum) else value


def row_of(action) -> tuple:
    """What the table should say of a parser's action."""
    kind, reader = ACTION_OF[type(action).__name__], getattr(action.type, "__name__", None)
    type_name = "literal" if reader in LITERALS else TYPE_OF.get(reader, reader)
    choices = tuple(str(plain(choice)) for choice in action.choices or ())
    if action.dest == "exit_signal":  # as many as the system has: read by name
        type_name, choices = "signal", ()
    nargs = action.nargs if kind == "store" else None
    default = False if kind == "help" else plain(action.default)
    return (
        tuple(action.option_strings),
        action.dest,
        kind,
        type_name if kind == "store" else "",
        nargs,
        choices,
        default,
    )


def differences(parser: argparse.ArgumentParser) -> list[str]:
    """Rows and actions that differ, by flag."""
    expected = {row[0]: row for row in map(row_of, parser._actions)}
    found = {a.flags: (a.flags, a.dest, a.action, a.type, a.nargs, a.choices, a.default) for a in load_arguments()}
    return [
        f"{' '.join(flags)}: Megatron {expected.get(flags)}, table {found.get(flags)}"
        for flags in {**expected, **found}
        if expected.get(flags) != found.get(flags)
    ]


def test_every_argument_of_megatron_has_its_row() -> None:
    parser = megatron_parser()
    assert differences(parser) == []
    assert len(parser._actions) == len(load_arguments()) == NUM_ACTIONS
    counts = Counter(argument.verdict for argument in load_arguments())
    print(f"{len(load_arguments())} arguments, 100 % in the table:", dict(sorted(counts.items())))
    assert min(counts[verdict] for verdict in Verdict) > 20
    limits = " ".join((Path(__file__).resolve().parents[3] / "docs" / "limits.md").read_text(encoding="utf-8").split())
    assert f"each of the {NUM_ACTIONS} of megatron-core 0.19.2 is honoured ({counts[Verdict.honoured]})" in limits
    assert f"decided by the plan ({counts[Verdict.plan]}), refused with a reason ({counts[Verdict.refused]})" in limits


def test_a_new_or_changed_argument_is_found() -> None:
    parser = megatron_parser()
    parser.add_argument("--of-a-new-release", type=int)
    parser._option_string_actions["--lr"].default = 1.0
    parser._option_string_actions["--optimizer"].choices = ["adam"]
    found = {line.partition(":")[0] for line in differences(parser)}
    assert found == {"--lr", "--optimizer", "--of-a-new-release"}


def test_rows_are_complete() -> None:
    flags = [flag for argument in load_arguments() for flag in argument.flags]
    assert len(set(flags)) == len(flags)
    for argument in load_arguments():
        assert len(argument.reason) > 5, argument
        assert set(argument.only) <= set(argument.choices) and set(argument.check_only) <= set(argument.choices), (
            argument
        )
        assert not argument.check_only or argument.check, argument
        assert argument.verdict is Verdict.honoured or not (argument.only or argument.needs or argument.check), argument
        assert not argument.only or str(argument.default) in (*argument.only, "None"), argument
        for need in argument.needs:
            dest, _, value = need.partition("=")
            needed = arguments_by_dest().get(dest)
            assert needed is not None or need in FACTS, argument
            assert needed is None or needed.verdict is Verdict.honoured, argument
            assert not value or not needed.choices or value in needed.choices, argument


def another_word(argument, among=()) -> list[str]:
    """A command line that sets the argument to something but its default: to a value that is refused, or one `among`"""
    if not argument.takes_value:
        return [argument.flags[-1] if argument.default is True else argument.flags[0]]
    possible = among or [choice for choice in argument.choices if choice not in argument.only]
    choices = [choice for choice in possible if choice != str(HELD[argument.dest])]
    word = choices[-1] if choices else {"signal": "SIGINT"}.get(argument.type, "7")
    return [argument.flags[0], *[word] * (argument.nargs if isinstance(argument.nargs, int) else 1)]


OF_VERDICT = {v: [a for a in load_arguments() if a.verdict is v and a.action != "help"] for v in Verdict}


def test_no_refused_argument_passes() -> None:
    for argument in OF_VERDICT[Verdict.refused]:
        words = another_word(argument)
        with pytest.raises(ConfigError) as caught:
            judge(read_words(words))
        assert caught.value.where == arguments_by_dest()[argument.dest].flag, words
        assert argument.reason in caught.value.expected, words


def test_what_the_plan_decides_is_not_said_twice() -> None:
    for argument in OF_VERDICT[Verdict.plan]:
        words = another_word(argument)
        with pytest.raises(ConfigError, match="what the plan decides"):
            judge(read_words(words))
        with pytest.raises(ConfigError, match="as in the plan"):
            judge(read_words(words), decided={argument.dest: 5})
        typed = read_words(words).typed[argument.dest]
        assert judge(read_words(words), decided={argument.dest: typed}) == ()


def test_whoever_sets_an_argument_without_effect_is_told() -> None:
    for argument in OF_VERDICT[Verdict.irrelevant]:
        (note,) = judge(read_words(another_word(argument)))
        assert note.startswith(argument.flag) and note.endswith(argument.reason)


def test_a_check_refuses_what_it_has_no_oracle_for() -> None:
    refused = {argument.dest for argument in load_arguments() if argument.check}
    stochastic = {a.dest for a in load_arguments() if "random" in a.check}
    assert stochastic == {"hidden_dropout", "attention_dropout", "moe_input_jitter_eps"}
    assert refused >= stochastic | {"bf16", "optimizer", "lr_decay_style", "load", "train_iters"}
    for dest in refused:
        argument = arguments_by_dest()[dest]
        fine = set(argument.only or argument.choices) - set(argument.check_only)
        line = read_words(another_word(argument, sorted(fine)))
        needed = dict(need.split("=") if "=" in need else (need, True) for need in argument.needs[:1])
        beside = CommandLine(typed=line.typed, defaults={**line.defaults, **needed})
        assert judge(beside, facts=FACTS) == (), dest  # honoured where one trains
        with pytest.raises(ConfigError, match="in a check") as caught:
            judge(beside, purpose=Purpose.check, facts=FACTS)
        assert caught.value.where == argument.flag
