"""Command lines of the reference model: read early, without Megatron, and refused in the form of all errors."""

import pytest

from megatron_mosaic.any2any.arguments import workload_of_command_line
from megatron_mosaic.config import load_workload
from megatron_mosaic.errors import ConfigError


def test_the_default_is_the_model_of_conf():
    assert workload_of_command_line([]).digest == load_workload(["model=any2any-digits"]).digest


def test_words_change_sizes_and_foreign_words_pass():
    workload = workload_of_command_line(["--num-layers", "8", "--lr", "1e-3", "--bf16", "--vision-num-layers=2"])
    assert (workload.by_name["llm"].num_layers, workload.by_name["vision"].num_layers) == (8, 2)


@pytest.mark.parametrize(
    ("words", "where", "got"),
    [
        (["--num-layers", "abc"], "--num-layers", "'abc'"),
        (["--seq-length"], "--seq-length", "expected one argument"),
        (["--generator-loss-weight", "x"], "--generator-loss-weight", "'x'"),
        (["--digits-files", "d", "--digits-seed", "7"], "--digits-seed", "7"),
        (["--digits-files", "d", "--digits-two-image-frac", "0.5"], "--digits-two-image-frac", "0.5"),
        (["--num-layers", "0"], "module 'llm': num_layers", "0"),
    ],
)
def test_refuses(words, where, got, capsys):
    with pytest.raises(ConfigError) as caught:
        workload_of_command_line(words)
    assert caught.value.where == where
    assert got in caught.value.got
    assert caught.value.fix
    assert capsys.readouterr() == ("", "")  # no usage
