"""Hydra words of the group `train`: the flags they become, read back by the parser; the file that lists all keys."""

import argparse
from importlib.resources import files

import pytest
import yaml

from megatron_mosaic.any2any.arguments import add_any2any_arguments, read_words
from megatron_mosaic.errors import ConfigError
from megatron_mosaic.runtime.flags.command_line import parser_of
from megatron_mosaic.runtime.flags.mosaic import add_mosaic_arguments
from megatron_mosaic.runtime.flags.table import Verdict, arguments_by_dest
from megatron_mosaic.runtime.flags.words import flags_of, refuse_twice, split_words

GIVEN = {"mosaic_plan", "mosaic_schedule", "mosaic_report", "mosaic_predicted", "mosaic_dump_gradients"}  # by commands


def flags(*words: str) -> list[str]:
    return flags_of(split_words(words)[0], add_any2any_arguments)


def typed(*words: str) -> dict:
    return dict(read_words(flags(*words)).typed)


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        ("train.lr=3e-4", {"lr": 3e-4}),
        ("train.train_iters=7", {"train_iters": 7}),
        ("train.exit_signal_handler=true", {"exit_signal_handler": True}),
        ("train.exit_signal_handler=false", {}),
        ("train.save=null", {}),
        ("train.save='a b'", {"save": "a b"}),
        ("train.save=-x", {"save": "-x"}),
        ("train.freeze=[vision,llm+projector]", {"freeze": ["vision", "llm+projector"]}),
        ("train.bias_gelu_fusion=false", {"bias_gelu_fusion": False}),
        ("train.bias_gelu_fusion=true", {}),
        ("train.rl_persist_cuda_graphs=false", {"rl_persist_cuda_graphs": False}),
        ("train.rl_persist_cuda_graphs=true", {"rl_persist_cuda_graphs": True}),
    ],
)
def test_a_word_is_the_flag_that_it_names(word, meant) -> None:
    assert typed(word) == meant


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("train.nonsense=1", "did you mean train."),
        ("train.train_iter=1", "did you mean train.train_iters"),
        ("train.lr", "train.KEY=VALUE"),
        ("train.exit_signal_handler=1", "true, false or null"),
        ("train.lr=abc", "a number"),
        ("train.save=[a", r"\[a,b\]"),
    ],
)
def test_a_wrong_word_is_refused(word, message) -> None:
    with pytest.raises(ConfigError, match=message):
        typed(word)


def test_the_same_argument_twice_is_refused() -> None:
    with pytest.raises(ConfigError, match="each key once"):
        split_words(["train.lr=1", "train.lr=2"])
    with pytest.raises(ConfigError, match="--train-iters beside it"):
        refuse_twice({"train_iters": "1"}, read_words(["--train-iters", "2"]).typed)


def test_the_file_of_the_group_lists_every_argument_that_acts() -> None:
    """Hydra knows the keys from there: completion, and a refusal of any other."""
    listed = yaml.safe_load((files("megatron_mosaic.conf") / "train" / "default.yaml").read_text())
    rows = arguments_by_dest()
    ours = {
        a.dest for a in add_mosaic_arguments(add_any2any_arguments(argparse.ArgumentParser(add_help=False)))._actions
    }
    acting = {row.dest for row in rows.values() if row.verdict is Verdict.honoured and row.action != "help"}
    assert set(listed) == (acting | ours) - GIVEN and set(listed.values()) == {None}
    assert {action.dest for action in parser_of(add_any2any_arguments)._actions} >= set(listed)
