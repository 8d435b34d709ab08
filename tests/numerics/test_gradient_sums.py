"""The distributed optimizer's own way of summing gradients, which `mosaic check` does not take: it dumps whole ones.

The same runs with the plain optimizer are the oracle: losses of six steps, of which all but the first see every
gradient so far.
"""

from dataclasses import replace

import pytest

from megatron_mosaic.plan import Layout
from tests.numerics import parity_cases as cases
from tests.numerics.checkpoint_runs import Run, losses, run_all

pytestmark = pytest.mark.dist

# What tp ranks add to vision's gradients after the sum over dp must not be lost when llm's sum is waited for.
SPLIT_TOKENS = cases.any2any_plan(("0-1", Layout(tp=2)), ("0-1", Layout(tp=2)), world_size=2, batch=4)
SPLIT_TOKENS = replace(
    SPLIT_TOKENS,
    modules={name: replace(m, sequence_parallel=m.layout.tp > 1) for name, m in SPLIT_TOKENS.modules.items()},
)
PLANS = {"split-tokens": SPLIT_TOKENS, "same-ranks": cases.SAME_RANKS, "overlapping": cases.OVERLAPPING}
DISTRIBUTED = "--use-distributed-optimizer"
FP32_SUMS = "--ddp-reduce-scatter-with-fp32-accumulation"
WAYS = [(DISTRIBUTED,), (DISTRIBUTED, "--overlap-grad-reduce")]
STEPS = ("--train-iters", "6", "--distributed-timeout-minutes", "1")


def test_every_way_to_sum_gradients_gives_the_same_losses(tmp_path) -> None:
    asked = [(plan, way) for plan in PLANS for way in [(), *WAYS]]
    asked.append(("same-ranks", (DISTRIBUTED, FP32_SUMS)))  # the last: Megatron never forgets that it was asked to
    run_all([Run(name=plan + "".join(way), plan=PLANS[plan], arguments=STEPS + way) for plan, way in asked], tmp_path)
    for plan, way in asked:
        expected, found = ([step["loss"] for step in losses(tmp_path, plan + "".join(w))] for w in ((), way))
        assert len(found) == 6 and found == pytest.approx(expected, rel=2e-6), (plan, way)
