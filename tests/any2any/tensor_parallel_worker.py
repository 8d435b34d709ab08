"""One of two ranks: the tp=2 model against the same weights at tp=1, rank by rank. `python FILE RANK STORE`."""

import sys

import conftest
import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel

from megatron_mosaic.any2any.data import DigitsDataset, collate
from megatron_mosaic.any2any.definition import Any2Any
from megatron_mosaic.any2any.sizes import DigitsMix
from megatron_mosaic.parallel_state_ext import cpu
from megatron_mosaic.plan import Layout

TP = 2


def main(rank: int, store: str) -> None:
    cpu.install()
    dist.init_process_group("gloo", rank=rank, world_size=TP, store=dist.FileStore(store, TP))
    parallel_state._set_global_memory_buffer()
    tensor_parallel.model_parallel_cuda_manual_seed(1, tp_rank=rank, ep_rank=0, etp_rank=0)
    alone = [dist.new_group([member]) for member in range(TP)][rank]
    model = Any2Any.from_args(conftest.parse_default_args())
    torch.manual_seed(7)  # the whole model is the same on both ranks
    names = list(model.workload.by_name)
    whole = {name: [model.build_stage(name, Layout(), 0, conftest.groups_of(alone))] for name in names}
    split = {name: [model.build_stage(name, Layout(tp=TP), 0, conftest.groups_of(dist.group.WORLD))] for name in names}
    for name in names:
        weights = dict(whole[name][0].named_parameters())
        for key, parameter in split[name][0].named_parameters():
            parameter.data.copy_(shard(weights[key].data, parameter, rank))

    mix = DigitsMix(two_image_frac=0.3, generate_frac=0.5)
    data = DigitsDataset("train", sizes=model.sizes, mix=mix, num_samples=6, seed=5)
    batch = collate([data[idx] for idx in range(6)])
    losses = {}
    for layout, stages in (("whole", whole), ("split", split)):
        losses[layout] = conftest.mean_loss(conftest.forward_all(model, stages, batch))
        losses[layout].backward()
    torch.testing.assert_close(losses["split"], losses["whole"])
    for name in names:
        grads = {key: parameter.grad for key, parameter in whole[name][0].named_parameters()}
        for key, parameter in split[name][0].named_parameters():
            torch.testing.assert_close(
                parameter.grad, shard(grads[key], parameter, rank), msg=lambda text, key=key: f"{key}: {text}"
            )
    print(f"rank {rank}: equal")
    dist.destroy_process_group()


def shard(full: torch.Tensor, parameter: torch.Tensor, rank: int) -> torch.Tensor:
    """This rank's part of a whole parameter or gradient; all of it where the parameter is replicated."""
    if not getattr(parameter, "tensor_model_parallel", False):
        return full
    return full.chunk(TP, parameter.partition_dim)[rank]


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
