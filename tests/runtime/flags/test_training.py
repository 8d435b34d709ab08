"""A plan's training as Megatron's arguments: obeyed, or refused by name. Needs neither torch nor Megatron."""

import subprocess
import sys
from argparse import Namespace
from dataclasses import replace

import pytest

from megatron_mosaic.errors import ConfigError, MosaicError, PlanError
from megatron_mosaic.plan.training import Format, Sharding, TrainingSetup
from megatron_mosaic.plan.validate import STOCK_SCRIPT
from megatron_mosaic.runtime.flags import training as training_module
from megatron_mosaic.runtime.flags.command_line import read_command_line
from megatron_mosaic.runtime.flags.training import (
    FLAGS,
    apply_training,
    decide_arguments,
    typed_of,
)

NOTHING = {key: flag.default for key, flag in FLAGS.items()}
FP32, BF16 = (TrainingSetup(format=each) for each in (Format.fp32, Format.bf16))


def refuse_contradictions(training, words):
    """As `mosaic train` reads them."""
    apply_training(Namespace(), training, read_command_line(words, lambda parser: parser, {}).typed)


@pytest.fixture
def engine(monkeypatch):
    """Transformer Engine as if it were installed."""
    monkeypatch.setattr(training_module, "find_spec", lambda name: name)


@pytest.mark.parametrize(
    ("setup", "decided"),
    [
        (FP32, {}),
        (BF16, {"bf16": True}),
        (replace(BF16, sharding=Sharding.optimizer), {"bf16": True, "use_distributed_optimizer": True}),
        (replace(FP32, gradient_overlap_frac=0.9), {}),  # what the cost model counts on
    ],
)
def test_format_and_sharding_decide(setup, decided):
    assert decide_arguments(setup) == NOTHING | decided
    args = Namespace(bf16=True, use_distributed_optimizer=True)  # the script's own defaults
    apply_training(args, setup, typed={})
    assert vars(args) == NOTHING | decided


def test_a_plan_that_does_not_say_decides_nothing():
    assert decide_arguments(None) == {}
    refuse_contradictions(None, ["--bf16", "--use-distributed-optimizer"])


@pytest.mark.parametrize(
    ("number_format", "decided"),
    [
        (Format.fp8, {"bf16": True, "fp8": "hybrid", "fp8_recipe": "tensorwise"}),
        (Format.mxfp8, {"bf16": True, "fp8": "e4m3", "fp8_recipe": "mxfp8"}),
        (Format.nvfp4, {"bf16": True, "fp4": "e2m1"}),
    ],
)
def test_low_formats_with_transformer_engine(engine, number_format, decided):
    setup = TrainingSetup(format=number_format)
    assert decide_arguments(setup) == NOTHING | decided
    apply_training(Namespace(transformer_impl="transformer_engine"), setup, typed={})
    with pytest.raises(ConfigError, match="--transformer-impl"):
        apply_training(Namespace(transformer_impl="local"), setup, typed={})


@pytest.mark.parametrize(
    ("setup", "where", "reason"),
    [
        (TrainingSetup(format=Format.fp8), "training.format", "Transformer Engine's, which is not installed"),
        (TrainingSetup(format=Format.mxfp8), "training.format", "Transformer Engine's, which is not installed"),
        (TrainingSetup(format=Format.nvfp4), "training.format", "Transformer Engine's, which is not installed"),
        (TrainingSetup(format=Format.fp16), "training.format", "fp16 needs a loss scale"),
        (TrainingSetup(sharding=Sharding.gradients), "training.sharding", "the runtime has no FSDP"),
        (TrainingSetup(sharding=Sharding.parameters), "training.sharding", "the runtime has no FSDP"),
    ],
)
def test_what_the_runtime_cannot_do_is_refused_with_the_reason(monkeypatch, setup, where, reason):
    monkeypatch.setattr(training_module, "find_spec", lambda name: None)
    with pytest.raises(PlanError, match=reason) as caught:
        decide_arguments(setup)
    assert caught.value.where == where
    assert caught.value.fix


def test_a_stock_script_has_a_loss_scale():
    assert decide_arguments(TrainingSetup(format=Format.fp16), STOCK_SCRIPT) == NOTHING | {"fp16": True}


@pytest.mark.parametrize(
    ("setup", "words", "flag", "said"),
    [
        (FP32, ["--bf16"], "--bf16", "format: fp32"),
        (FP32, ["--fp16"], "--fp16", "format: fp32"),
        (BF16, ["--bf16", "--fp16"], "--fp16", "format: bf16"),
        (BF16, ["--fp8-format", "hybrid"], "--fp8-format", "format: bf16"),
        (BF16, ["--fp8-format=e4m3"], "--fp8-format", "format: bf16"),
        (BF16, ["--fp4-format", "e2m1"], "--fp4-format", "format: bf16"),
        (BF16, ["--lr", "1", "--use-distributed-optimizer"], "--use-distributed-optimizer", "sharding: none"),
    ],
)
def test_flags_that_contradict_the_plan_are_refused(setup, words, flag, said):
    with pytest.raises(ConfigError) as caught:
        refuse_contradictions(setup, words)
    assert caught.value.where == flag
    assert said in caught.value.expected
    assert flag in caught.value.fix


@pytest.mark.parametrize(
    ("setup", "words"),
    [
        (FP32, ["--lr", "1e-3"]),
        (BF16, ["--bf16"]),
        (replace(BF16, sharding=Sharding.optimizer), ["--use-distributed-optimizer", "--bf16"]),
    ],
)
def test_flags_that_repeat_the_plan_are_not(setup, words):
    refuse_contradictions(setup, words)


def test_only_what_was_typed_can_contradict():
    args = Namespace(bf16=True, fp8=None, use_distributed_optimizer=True)
    assert typed_of(args, {}) == {"bf16": True, "use_distributed_optimizer": True}
    assert typed_of(args, {"bf16": True}) == {"use_distributed_optimizer": True}
    with pytest.raises(MosaicError, match="--use-distributed-optimizer"):
        apply_training(args, FP32, typed_of(args, {"bf16": True}))


def test_a_command_line_is_refused_without_torch():
    code = "import sys; import megatron_mosaic.runtime.flags.training; print({'torch', 'megatron'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
