"""The oracle's learning rate against Megatron's scheduler, which it shares no line with."""

from argparse import Namespace
from types import SimpleNamespace

import pytest
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_mosaic.parity.learning_rate import learning_rate_at

BATCH = 12  # Megatron counts samples


@pytest.mark.parametrize("style", ["constant", "linear", "cosine"])
@pytest.mark.parametrize(("warmup_iters", "warmup_fraction"), [(0, None), (3, None), (0, 0.0), (0, 0.35)])
@pytest.mark.parametrize(("decay_iters", "factor"), [(None, 1.0), (6, 1.0), (8, 0.25)])
def test_every_step_has_megatrons_rate(style, warmup_iters, warmup_fraction, decay_iters, factor) -> None:
    args = Namespace(lr=3e-3, min_lr=2e-4, lr_warmup_init=1e-5, lr_decay_style=style, train_iters=10)
    args.lr_decay_iters, args.lr_warmup_iters, args.lr_warmup_fraction = decay_iters, warmup_iters, warmup_fraction
    group = {"max_lr": factor * args.lr, "min_lr": factor * args.min_lr}
    length = (decay_iters or 10) * BATCH
    scheduler = OptimizerParamScheduler(
        SimpleNamespace(param_groups=[group]),
        init_lr=args.lr_warmup_init,
        max_lr=args.lr,
        min_lr=args.min_lr,
        lr_warmup_steps=warmup_iters * BATCH if warmup_fraction is None else warmup_fraction * length,
        lr_decay_steps=length,
        lr_decay_style=style,
        start_wd=0.0,
        end_wd=0.0,
        wd_incr_steps=10 * BATCH,
        wd_incr_style="constant",
    )
    for step in range(11):
        assert learning_rate_at(args, step, factor) == pytest.approx(group["lr"], rel=1e-12), step
        scheduler.step(BATCH)
