"""Words read with the table: as Megatron's parser reads them, and refused with where, got, expected and fix."""

import argparse

import megatron.training.arguments as megatron_arguments
import pytest

from megatron_mosaic.errors import ConfigError
from megatron_mosaic.runtime.flags.command_line import read_command_line
from megatron_mosaic.runtime.flags.judge import judge
from megatron_mosaic.runtime.flags.mosaic import add_mosaic_arguments


def no_more(parser):
    """A script without arguments of its own."""
    return parser


def read(*words, defaults=None):
    return read_command_line(words, no_more, defaults or {})


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["--lr", "1e-3", "--optimizer=sgd", "--num-layers", "8", "--swiglu", "--no-rope-fusion"],
        ["--data-path", "0.3", "a", "0.7", "b", "--recompute-modules", "core_attn", "mlp", "--seed=-1"],
        ["--rampup-batch-size", "1", "2", "3", "--moe-router-load-balancing-type", "none", "aux_loss"],
        ["--rl-partial-rollouts", "--no-rl-persist-cuda-graphs", "--disable-ckpt-load-validate-sharding-integrity"],
        ["--no-yarn-correction-range-round-to-int", "--lr", "1", "--lr", "2"],
    ],
)
def test_words_mean_what_they_mean_to_megatron(words) -> None:
    parser = add_mosaic_arguments(megatron_arguments.add_megatron_arguments(argparse.ArgumentParser()))
    theirs = vars(parser.parse_args(words))
    line = read(*words)
    ours = {**vars(argparse.Namespace(**{**line.defaults, **line.typed})), "exit_signal": theirs["exit_signal"]}
    ours |= {"attention_backend": theirs["attention_backend"], "help": None}
    ours |= {"calculate_per_token_loss": False, "dataloader_type": None}  # decided under every plan
    assert ours == {**theirs, "help": None}
    flags = {word.partition("=")[0] for word in words if word.startswith("--")}
    assert len(line.typed) == len(flags)


@pytest.mark.parametrize(
    ("words", "where", "got", "expected", "fix"),
    [
        (["--no-such-flag"], "--no-such-flag", "nobody has", "in full", "leave it out"),
        (["--no-such-flag=3"], "--no-such-flag", "nobody has", "in full", "leave it out"),
        (["--hidden-drop", "0.1"], "--hidden-drop", "nobody has", "in full", "did you mean --hidden-dropout?"),
        (["--num-layer", "4"], "--num-layer", "nobody has", "in full", "--num-layers"),
        (["--nun-layers", "4"], "--nun-layers", "nobody has", "in full", "--num-layers"),
        (["--num-layers", "abc"], "--num-layers", "'abc'", "a whole number", "correct"),
        (["--lr=fast"], "--lr", "'fast'", "a number", "correct"),
        (["--num-layers"], "--num-layers", "expected one argument", "a whole number", "correct"),
        (["--normalization", "BatchNorm"], "--normalization", "'BatchNorm'", "LayerNorm, RMSNorm", "correct"),
        (["--rampup-batch-size", "1", "2"], "--rampup-batch-size", "3 arguments", "3 values", "correct"),
        (["--profile-ranks"], "--profile-ranks", "at least one", "one value or more", "correct"),
        (["--bf16=yes"], "--bf16", "'yes'", "no value", "correct"),
        (["--exit-signal", "SIGNOTHING"], "--exit-signal", "SIGNOTHING", "a word", "correct"),
        (["--lr", "1", "stray"], "stray", "no argument", "--flag value", "flag"),
    ],
)
def test_wrong_words(words, where, got, expected, fix, capsys) -> None:
    with pytest.raises(ConfigError) as caught:
        read(*words)
    error = caught.value
    assert error.where == where
    assert got in error.got and expected in error.expected and fix in error.fix
    assert capsys.readouterr() == ("", "")  # no usage


def test_defaults_give_way_to_what_is_typed() -> None:
    defaults = {"lr_warmup_fraction": 0.05, "train_iters": 600}
    assert read("--lr-warmup-iters", "3", defaults=defaults).values.lr_warmup_fraction is None
    assert read("--train-samples", "30", defaults=defaults).values.train_iters is None
    assert read("--lr", "3", defaults=defaults).values.lr_warmup_fraction == 0.05
    both = read("--lr-warmup-iters", "3", "--lr-warmup-fraction", "0.1", defaults=defaults)
    assert both.values.lr_warmup_fraction == 0.1
    with pytest.raises(ConfigError, match="one of the two"):
        judge(both)


@pytest.mark.parametrize(
    ("words", "where"),
    [
        (["--optimizer=muon"], "--optimizer"),
        (["--optimizer", "lion"], "--optimizer"),
        (["--softmax-type", "learnable"], "--softmax-type"),
        (["--ckpt-format=torch"], "--ckpt-format"),
        (["--num-query-groups", "2"], "--num-query-groups"),
        (["--rotary-base", "500"], "--rotary-base"),
        (["--sgd-momentum", "0.5"], "--sgd-momentum"),
        (["--optimizer", "sgd", "--adam-eps", "1"], "--adam-eps"),
        (["--moe-router-pre-softmax"], "--moe-router-pre-softmax"),
        (["--add-qkv-bias"], "--add-qkv-bias"),
        (["--wandb-entity", "us"], "--wandb-entity"),
    ],
)
def test_values_that_would_be_ignored_are_refused(words, where) -> None:
    with pytest.raises(ConfigError) as caught:
        judge(read(*words))
    assert caught.value.where == where and "leave" in caught.value.fix


@pytest.mark.parametrize(
    "words",
    [
        ["--optimizer", "adam"],
        ["--moe-layer-freq", "1"],  # the default, though as text
        ["--group-query-attention", "--num-query-groups", "2"],
        ["--use-rotary-position-embeddings", "--rotary-base", "500"],
        ["--position-embedding-type=rope", "--rotary-base=500"],
        ["--disable-bias-linear", "--add-qkv-bias"],
        ["--optimizer=sgd", "--sgd-momentum=0.5"],
    ],
)
def test_values_that_are_honoured(words) -> None:
    assert judge(read(*words)) == ()
