"""Trains the three tasks of any2any-tasks on one process, plain autograd, and prints their losses on held-out digits.

python scripts/train_tasks.py --steps 150 [MEGATRON ARGS]      every step has samples of all: caption, pairs, draw

This is the oracle (`parity/task_reference.py`), not the runtime: nothing trains tasks on several processes yet.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch.distributed as dist
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.training.arguments import parse_args, validate_args

from megatron_mosaic.any2any.arguments import MEGATRON_DEFAULTS, add_any2any_arguments, workload_from_args
from megatron_mosaic.any2any.blocks import config_from_args
from megatron_mosaic.any2any.data import Split
from megatron_mosaic.any2any.definition import Any2Any
from megatron_mosaic.any2any.tasks.data import TaskSamples
from megatron_mosaic.parallel_state_ext.grids import Grids
from megatron_mosaic.parallel_state_ext.rank_view import RankView
from megatron_mosaic.parallel_state_ext.rebound import cpu
from megatron_mosaic.parity.reference import ALONE
from megatron_mosaic.parity.task_reference import TaskReference
from megatron_mosaic.plan import Plan, ScheduleChoice
from megatron_mosaic.plan.workload_file import load_workload_file
from megatron_mosaic.runtime.flags.mosaic import add_mosaic_arguments

MODEL = Path(__file__).parents[1] / "megatron_mosaic" / "conf" / "model" / "any2any-tasks.yaml"
OPTIMIZER = {"lr": 3e-3, "min_lr": 3e-3, "lr_decay_style": "constant", "lr_warmup_iters": 0}


def parse_megatron(words: list[str]) -> argparse.Namespace:
    """Megatron's arguments for one process; what it prints goes to stderr."""

    def add(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        add_mosaic_arguments(add_any2any_arguments(parser))
        parser.set_defaults(**(MEGATRON_DEFAULTS | cpu.ARGUMENT_DEFAULTS | OPTIMIZER))
        return parser

    sys.argv = [sys.argv[0], *words]
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1"}
    with contextlib.redirect_stdout(sys.stderr):
        args = parse_args(add)
        workload_from_args(args)  # sets what follows from others
        return validate_args(args)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=150)
    own, rest = parser.parse_known_args()
    cpu.install()
    args, workload = parse_megatron(rest), load_workload_file(MODEL)
    dist.init_process_group("gloo", world_size=1, rank=0, store=dist.HashStore())
    model_parallel_cuda_manual_seed(args.seed, tp_rank=0, ep_rank=0, etp_rank=0)
    alone = Plan(
        workload=workload.name,
        world_size=1,
        global_batch_size=workload.global_batch_size,
        micro_batch_size=1,
        schedule=ScheduleChoice("1f1b"),
        modules={module.name: ALONE for module in workload.modules},
    )
    groups = Grids(RankView.of(alone, 0), timeout=timedelta(minutes=1)).alone_view()
    definition = Any2Any(workload, build_config=partial(config_from_args, args))
    reference = TaskReference(definition, groups, args)
    train = TaskSamples(workload, Split.train, seed=args.digits_seed)
    held_out = TaskSamples(workload, Split.valid, seed=args.digits_seed).step(0)
    for number in range(own.steps + 1):
        if number % max(1, own.steps // 10) == 0:
            losses, _ = reference.find_gradients(held_out)
            print(f"step {number:>4} |", "  ".join(f"{task} {loss:.3f}" for task, loss in losses.items()), flush=True)
        reference.find_gradients(train.step(number))
        reference.update()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
