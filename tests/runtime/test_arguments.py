"""Inside a rank: the values that Megatron's parser and its validation made are judged, not the words."""

import sys

import megatron.training.arguments as megatron_arguments
import pytest

from megatron_mosaic.any2any.arguments import MEGATRON_DEFAULTS, add_any2any_arguments, workload_from_args
from megatron_mosaic.errors import ConfigError
from megatron_mosaic.plan import Layout
from megatron_mosaic.runtime import arguments
from megatron_mosaic.runtime.arguments import SET_BY_VALIDATION, parse_and_validate_args
from megatron_mosaic.runtime.flags.table import Verdict, load_arguments
from tests.numerics import parity_cases as cases

PLAN = cases.any2any_plan(("0-1", Layout(pp=2)), ("0-3", Layout(tp=2, pp=2)), ("2-3", Layout(tp=2)))


@pytest.fixture
def parse(tmp_path, monkeypatch):
    path = cases.written(PLAN, tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setattr(arguments, "set_global_variables", lambda args: None)

    def parse(*words):
        monkeypatch.setattr(sys, "argv", ["pretrain", "--mosaic-plan", path, *words])
        return parse_and_validate_args(workload_from_args, add_any2any_arguments, MEGATRON_DEFAULTS)

    return parse


def test_the_plan_is_written_into_the_arguments(parse, capsys) -> None:
    args, plan = parse("--lr-warmup-iters", "2", "--tensor-model-parallel-size", "2", "--data-path", "x")
    assert plan == PLAN
    assert (args.tensor_model_parallel_size, args.pipeline_model_parallel_size, args.micro_batch_size) == (2, 2, 2)
    assert args.world_size == 4 and args.data_parallel_size == 1
    assert (args.lr_warmup_iters, args.lr_warmup_fraction, args.max_position_embeddings) == (2, None, 64)
    assert args.calculate_per_token_loss and args.dataloader_type == "external"
    assert "> mosaic: --data-path has no effect here" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "where"),
    [
        (["--optimizer=muon"], "--optimizer"),
        (["--decoupled-lr", "1e-3"], "--decoupled-lr"),
        (["--recompute-granularity", "selective"], "--recompute-granularity"),
        (["--context-parallel-size", "2"], "--context-parallel-size"),
        (["--no-such-flag"], "--no-such-flag"),
        (["--lr", "slow"], "--lr"),
        (["--save", "checkpoints"], "Megatron's validation of the arguments"),  # without --save-interval
    ],
)
def test_refused(words, where, parse) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(*words)
    assert caught.value.where == where


def test_what_validation_sets_from_others_is_judged(parse, monkeypatch) -> None:
    stock = megatron_arguments.validate_args

    def validate(args, defaults):
        args.multi_latent_attention = True
        return stock(args, defaults)

    monkeypatch.setattr(megatron_arguments, "validate_args", validate)
    with pytest.raises(ConfigError, match="--multi-latent-attention"):
        parse()


def test_what_validation_sets_by_itself_is_listed(parse, monkeypatch) -> None:
    """Neither more, which would let something through, nor less, which would refuse every run."""
    stock, changed = megatron_arguments.validate_args, set()

    def validate(args, defaults):
        before = dict(vars(args))
        stock(args, defaults)
        changed.update(key for key, value in before.items() if getattr(args, key, value) != value)
        return args

    monkeypatch.setattr(megatron_arguments, "validate_args", validate)
    parse()
    judged = {row.dest for row in load_arguments() if row.verdict in (Verdict.refused, Verdict.plan)}
    assert changed & judged == SET_BY_VALIDATION
