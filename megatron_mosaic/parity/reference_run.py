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
from megatron_mosaic.parity.reference import Gradients, Reference
from megatron_mosaic.parity.reference_files import ReferenceStep, save_parameters
from megatron_mosaic.parity.verdict import norm, ratio
from megatron_mosaic.runtime.arguments import parse_and_validate_args


def main(directory: str, measure_rounding: bool) -> int:
    """Train on one process, whole global batches, and write a ReferenceStep per step and the parameters at the end.

    `measure_rounding`: an earlier run has written its steps into the directory. Where this one repeats them to the bit,
    how well fp32 determines each gradient is found out, too.
    """
    args, plan = parse_and_validate_args(workload_from_args, add_any2any_arguments, MEGATRON_DEFAULTS)
    dist.init_process_group("gloo", world_size=1, rank=0)
    # Weights are drawn by name. Whatever else draws random numbers shall not repeat itself by its seed.
    model_parallel_cuda_manual_seed(args.seed + measure_rounding, tp_rank=0, ep_rank=0, etp_rank=0)
    groups = Grids(RankView.of(plan, 0), timeout=timedelta(minutes=1)).alone_view()
    definition = Any2Any.from_args(args, workload_from_args(args))
    reference = Reference(definition, groups, args)
    samples = make_datasets(args, definition.workload)((args.train_iters * args.global_batch_size, 1, 1))[0]
    collate = make_collate(args, definition.workload)
    for step in range(args.train_iters):
        first = step * args.global_batch_size
        batch = collate([samples[i] for i in range(first, first + args.global_batch_size)])
        losses, gradients = reference.find_gradients(batch)
        earlier = ReferenceStep.load(Path(directory), step).gradients if measure_rounding else gradients
        unrepeatable = _differing(earlier, gradients)
        rounding = reference.find_rounding(batch, gradients) if measure_rounding and not unrepeatable else {}
        reference.update()
        found = ReferenceStep(losses=losses, gradients=gradients, rounding=rounding, unrepeatable=unrepeatable)
        found.save(Path(directory), step)
    save_parameters(Path(directory), reference.parameters)
    return 0


def _differing(earlier: Gradients, gradients: Gradients) -> dict[str, float]:
    """Relative difference of gradients that are not the same to the bit."""
    return {
        name: ratio(norm(gradients[name] - earlier[name]), norm(earlier[name]))
        for name in gradients
        if earlier[name].tobytes() != gradients[name].tobytes()
    }
