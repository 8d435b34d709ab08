"""Small workloads, clusters, plans and a made-up profile for planner tests. Nothing here is a measurement."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import strategies as st

from megatron_mosaic.cost_model.hardware.profile import Profile
from megatron_mosaic.plan import Layout, ModulePlan, Plan, RankSet, ScheduleChoice
from megatron_mosaic.plan.cluster import Cluster, GpuType, Link
from megatron_mosaic.plan.workload import Edge, ModuleConfig, Role, Workload

VISION = ModuleConfig(
    name="vision",
    role=Role.encoder,
    num_layers=4,
    hidden_size=64,
    num_heads=4,
    ffn_hidden_size=256,
    tokens_per_item=16,
    input_size=4,
    output_size=64,
)
LLM = replace(
    VISION, name="llm", role=Role.backbone, tokens_per_item=64, vocab_size=128, input_size=0, output_size=0, causal=True
)
GENERATOR = replace(VISION, name="generator", role=Role.generator, output_size=4)
EDGES = (
    Edge(source="vision", target="llm", rows_per_item=16, width=64),
    Edge(source="llm", target="generator", rows_per_item=16, width=64),
)
WORKLOAD = Workload(name="toy", modules=(VISION, LLM, GENERATOR), edges=EDGES, global_batch_size=16)
BACKBONE_ONLY = Workload(name="toy", modules=(LLM,), global_batch_size=16)


def make_cluster(num_ranks: int = 4, *, gpus_per_node: int = 0, flops_per_s: float = 1e12) -> Cluster:
    """A made-up GPU cluster, slow enough for toy modules to take time."""
    keys = ("num_sms", "sm_granularity", "memory_bytes", "flops_per_s", "memory_bytes_per_s", "gemm_efficiency_frac")
    gpu = GpuType(
        name="toy",
        num_sms=132,
        sm_granularity=8,
        memory_bytes=80e9,
        flops_per_s=flops_per_s,
        memory_bytes_per_s=1e12,
        gemm_efficiency_frac=0.5,
        sources=dict.fromkeys(keys, "made up for tests"),
    )
    per_node = gpus_per_node or num_ranks
    return Cluster(
        name="toy",
        gpu=gpu,
        num_nodes=num_ranks // per_node,
        gpus_per_node=per_node,
        intra=Link(name="fast", bytes_per_s=100e9, latency_s=1e-6, source="made up for tests"),
        inter=Link(name="slow", bytes_per_s=10e9, latency_s=5e-6, source="made up for tests"),
    )


def make_profile(workload: Workload = WORKLOAD, *, cores: int = 2, tps: tuple[int, ...] = (1, 2, 4)) -> Profile:
    """A made-up profile with straight lines: layer 1 ms + 1 ms an item, halved by two threads and by tp."""

    def points(tp: int, threads: int) -> list[dict[str, object]]:
        return [
            {
                "part": part,
                "items": items,
                "forward_s": scale * (1 + items) * 1e-3 / tp / threads,
                "backward_s": 2 * scale * (1 + items) * 1e-3 / tp / threads,
            }
            for part, scale in (("pre", 0.1), ("layer", 1.0), ("post", 0.2))
            for items in (1, 4, 16)
        ]

    curve = [{"bytes": 1000, "seconds": 1.1e-4}, {"bytes": 1_000_000, "seconds": 1.1e-3}]
    data = {
        "mosaic_profile": 1,
        "provenance": {"cpu_model": "made up", "date": "2026-11-20", "versions": {"python": "3.12"}},
        "machine": {"cores": cores, "memory_bytes": 8e9, "flops_per_s": 1e11, "memory_bytes_per_s": 1e10},
        "workload": workload.name,
        "digest": workload.digest,
        "modules": {
            module.name: {tp: {n: points(tp, n) for n in range(1, cores + 1)} for tp in tps}
            for module in workload.modules
        },
        "collectives": {
            op: {n: curve for n in ((2,) if op == "p2p" else range(2, 9))}
            for op in ("all_reduce", "all_gather", "reduce_scatter", "p2p")
        },
        "optimizer": [{"params": 10_000, "seconds": 1e-3}, {"params": 1_000_000, "seconds": 1e-2}],
    }
    return Profile.model_validate(data)


def make_plan(
    modules: dict[str, tuple[str, Layout]],
    *,
    workload: Workload = WORKLOAD,
    world_size: int = 4,
    global_batch_size: int = 16,
    micro_batch_size: int = 1,
) -> Plan:
    """A 1F1B plan from `{name: ("0-3", Layout(...))}`."""
    return Plan(
        workload=workload.name,
        digest=workload.digest,
        world_size=world_size,
        global_batch_size=global_batch_size,
        micro_batch_size=micro_batch_size,
        schedule=ScheduleChoice("1f1b"),
        modules={name: ModulePlan(ranks=RankSet.parse(r), layout=x) for name, (r, x) in modules.items()},
    )


@st.composite
def placements(draw: st.DrawFn, world_size: int = 4) -> ModulePlan:
    """Any rank set of a power of two ranks (contiguous or not) with any tp x pp x dp on it."""
    size = draw(st.sampled_from([n for n in (1, 2, 4, 8) if n <= world_size]))
    ranks = draw(st.lists(st.sampled_from(range(world_size)), min_size=size, max_size=size, unique=True))
    tp = draw(st.sampled_from([n for n in (1, 2, 4) if n <= size]))
    pp = draw(st.sampled_from([n for n in (1, 2, 4) if n <= size // tp]))
    return ModulePlan(ranks=RankSet.of(ranks), layout=Layout(tp=tp, pp=pp, dp=size // tp // pp))


@st.composite
def plans(draw: st.DrawFn, workload: Workload = WORKLOAD, world_size: int = 4) -> Plan:
    """Legal plans of the runtime for a workload: every module anywhere, overlaps of any kind."""
    modules = {module.name: draw(placements(world_size)) for module in workload.modules}
    micro_batch_size = draw(st.sampled_from([1, 2]))
    lane_batch = micro_batch_size * modules[workload.backbone.name].layout.dp
    return Plan(
        workload=workload.name,
        digest=workload.digest,
        world_size=world_size,
        global_batch_size=lane_batch * draw(st.integers(1, 6)),
        micro_batch_size=micro_batch_size,
        schedule=ScheduleChoice("1f1b"),
        modules=modules,
    )
