"""A step's model FLOPs of the GPUs' peak, and its throughput beside that of the backbone alone on text.

    MFU       FLOPs of all modules' forwards and of the backwards that they need / (seconds x GPUs x peak of the format)
    relative  samples a second and a GPU, over those of the backbone's own layout with nothing else to do

Recomputation is no model FLOP (Chowdhery et al. 2022, appendix B). Attention counts what its mask and windows leave.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from megatron_mosaic.cost_model.effects.counts import count_flops
from megatron_mosaic.cost_model.effects.kernels import flops_per_s
from megatron_mosaic.cost_model.hardware.profile import Part
from megatron_mosaic.cost_model.model import CostModel
from megatron_mosaic.cost_model.simulate import estimate_step
from megatron_mosaic.cost_model.work import list_stage_work
from megatron_mosaic.plan import Plan, Quota, RankSet, ScheduleChoice
from megatron_mosaic.plan.workload import ModuleConfig, Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class Efficiency:
    """Of one predicted step, as fractions."""

    mfu_frac: float
    relative_frac: float

    def as_dict(self) -> dict[str, float]:
        return {"mfu": self.mfu_frac, "relative_throughput": self.relative_frac}

    def __str__(self) -> str:
        return f"MFU {self.mfu_frac:.1%}, {self.relative_frac:.0%} of the backbone's throughput alone"


def estimate_efficiency(plan: Plan, step_s: float, model: CostModel) -> Efficiency:
    """Of a plan whose step is predicted to take so long."""
    step_flops, peak = step_flops_and_peak(plan, model)
    mfu_frac = step_flops / (step_s * peak)
    num_ranks, alone_s = _backbone_alone(plan, model)
    return Efficiency(mfu_frac=mfu_frac, relative_frac=alone_s * num_ranks / (step_s * plan.world_size))


def step_flops_and_peak(plan: Plan, model: CostModel) -> tuple[float, float]:
    """Model FLOPs of the plan's step, and peak FLOPs a second of all its ranks' devices: from the datasheet. Of CPUs,
    whose cores the ranks share: what a large product was measured to reach on all of them."""
    cluster = model.cluster
    workload = replace(model.workload, global_batch_size=plan.global_batch_size)
    if cluster.shared_cores:
        peak = cluster.gpu.flops_per_s
    else:
        peak = flops_per_s(cluster.gpu, model.source.setup.format) * plan.world_size
    return count_step_flops(workload), peak


def count_step_flops(workload: Workload) -> float:
    """Model FLOPs of a step: a forward, as much again for gradients of what flows, and for those of weights."""
    total = 0.0
    for module in workload.modules:
        items = workload.global_batch_size * module.items_per_sample
        layers, ends = _forward_flops(module)
        passes = 1 + (not module.frozen) + workload.hidden_has_gradient(module.name)
        head = 1 + 2 * module.trains_projector
        total += items * (passes * layers + max(passes, head) * ends)
    return total


def _forward_flops(module: ModuleConfig) -> tuple[float, float]:
    """Of an item: in the layers and before them, and behind them."""
    layer = count_flops(module, Part.layer)
    last = count_flops(replace(module, num_dense_layers=0), Part.layer) if module.num_experts else layer
    layers = module.num_layers * layer + module.num_mtp_layers * last
    return layers + count_flops(module, Part.pre), count_flops(module, Part.post)


def _backbone_alone(plan: Plan, model: CostModel) -> tuple[int, float]:
    """Its ranks, and seconds of its step in the same layout, with the same samples."""
    backbone = model.workload.backbone
    placed = plan.modules[backbone.name]
    size = len(placed.ranks)
    alone = replace(
        plan,
        world_size=size,
        modules={backbone.name: replace(placed, ranks=RankSet.block(0, size), quota=Quota())},
        schedule=ScheduleChoice("interleaved" if placed.layout.vpp > 1 else "1f1b"),
    )
    workload = replace(model.workload, modules=(backbone,), edges=())
    price = model.price_work(list_stage_work(alone, workload, model.cluster.gpus_per_node))
    return size, estimate_step(price).step_s
