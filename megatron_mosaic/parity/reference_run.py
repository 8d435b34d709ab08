"""The single-process reference of the reference model: the oracle's side of `mosaic check`."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import torch.distributed as dist
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from megatron_mosaic.any2any.arguments import MEGATRON_DEFAULTS, add_any2any_arguments, workload_from_args
from megatron_mosaic.any2any.definition import Any2Any
from megatron_mosaic.any2any.pretrain import make_collate, make_datasets
from megatron_mosaic.parallel_state_ext.grids import Grids
from megatron_mosaic.parallel_state_ext.rank_view import RankView
from megatron_mosaic.parity.reference import Reference
from megatron_mosaic.runtime.arguments import parse_and_validate_args


def main(directory: str, measure_rounding: bool) -> int:
    """Train on one process, whole global batches, and write `reference-N.npz` per step into the directory."""
    args, plan = parse_and_validate_args(workload_from_args, add_any2any_arguments, MEGATRON_DEFAULTS)
    dist.init_process_group("gloo", world_size=1, rank=0)
    model_parallel_cuda_manual_seed(args.seed, tp_rank=0, ep_rank=0, etp_rank=0)
    groups = Grids(RankView.of(plan, 0), timeout=timedelta(minutes=1)).alone_view()
    definition = Any2Any.from_args(args, workload_from_args(args))
    reference = Reference(definition, groups, args)
    samples = make_datasets(args, definition.workload)((args.train_iters * args.global_batch_size, 1, 1))[0]
    collate = make_collate(args, definition.workload)
    for step in range(args.train_iters):
        first = step * args.global_batch_size
        batch = collate([samples[i] for i in range(first, first + args.global_batch_size)])
        reference.step(batch, measure_rounding=measure_rounding).save(Path(directory), step)
    return 0
