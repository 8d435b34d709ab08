"""A one-module plan on a stock script: written into Megatron's arguments, or refused by name."""

from argparse import Namespace
from dataclasses import replace

import pytest

from megatron_mosaic.adapters.stock import apply_to_stock_script
from megatron_mosaic.errors import ConfigError, MosaicError
from megatron_mosaic.plan import Layout
from megatron_mosaic.plan.training import Format, Sharding, TrainingSetup
from megatron_mosaic.runtime.flags.training import FLAGS
from tests.cases import BACKBONE_ONLY, make_plan

PLAN = make_plan({"llm": ("0-3", Layout(tp=2, dp=2))}, workload=BACKBONE_ONLY)
SPLIT = replace(PLAN, modules={"llm": replace(PLAN.modules["llm"], sequence_parallel=True)})


def arguments(**changed) -> Namespace:
    """Of a stock script on four processes, nothing typed but what is given."""
    degrees = ("tensor", "context", "pipeline", "expert")
    given = {f"{axis}_model_parallel_size": 1 for axis in degrees if axis != "context"} | {"context_parallel_size": 1}
    given |= {"world_size": 4, "sequence_parallel": False} | {key: flag.default for key, flag in FLAGS.items()}
    return Namespace(**given | changed)


@pytest.mark.parametrize("plan", [PLAN, SPLIT])
def test_sequence_parallelism_is_the_plans(plan):
    args = arguments()
    apply_to_stock_script(args, plan)
    assert args.sequence_parallel is plan.modules["llm"].sequence_parallel
    assert args.tensor_model_parallel_size == 2


def test_sequence_parallelism_that_the_plan_does_not_have_is_refused():
    with pytest.raises(ConfigError) as caught:
        apply_to_stock_script(arguments(sequence_parallel=True), PLAN)
    assert caught.value.where == "--sequence-parallel"
    apply_to_stock_script(arguments(sequence_parallel=True), SPLIT)


def test_format_and_sharding_are_the_plans():
    for number_format, sharding in ((Format.fp16, Sharding.none), (Format.bf16, Sharding.optimizer)):
        args = arguments()
        apply_to_stock_script(args, replace(PLAN, training=TrainingSetup(format=number_format, sharding=sharding)))
        assert (args.fp16, args.bf16) == (number_format is Format.fp16, number_format is Format.bf16)
        assert args.use_distributed_optimizer is (sharding is Sharding.optimizer)
    args = arguments(bf16=True)
    apply_to_stock_script(args, PLAN)  # a plan that does not say leaves them alone
    assert args.bf16


@pytest.mark.parametrize(
    ("setup", "changed", "where"),
    [
        (TrainingSetup(), {"use_distributed_optimizer": True}, "--use-distributed-optimizer"),
        (TrainingSetup(format=Format.fp32), {"bf16": True}, "--bf16"),
        (TrainingSetup(), {"fp8": "hybrid"}, "--fp8-format"),
        (TrainingSetup(sharding=Sharding.parameters), {}, "training.sharding"),
    ],
)
def test_contradictions_are_refused(setup, changed, where):
    with pytest.raises(MosaicError) as caught:
        apply_to_stock_script(arguments(**changed), replace(PLAN, training=setup))
    assert caught.value.where == where
