"""Random workloads, legal plans for them, and what microbatches bring: for tests of whole plans without a model."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from hypothesis import strategies as st

from megatron_mosaic.parallel_state_ext.boundaries.items import Items, Links, integers
from megatron_mosaic.parallel_state_ext.boundaries.step_map import Metadata
from megatron_mosaic.plan import Layout, ModulePlan, Plan, RankSet, Recompute, ScheduleChoice, validate_plan
from megatron_mosaic.plan.workload import Edge, ModuleConfig, Role, Workload

BACKBONE = "llm"
ITEM_TOKENS, SEQUENCE = 16, 64
WIDTH = 16


def module(name: str, role: Role, **changes: object) -> ModuleConfig:
    """A small module; tp and cp up to 4 divide everything."""
    backbone = role is Role.backbone
    sizes: dict[str, object] = {
        "num_layers": 4,
        "hidden_size": 16,
        "num_heads": 4,
        "ffn_hidden_size": 32,
        "tokens_per_item": SEQUENCE if backbone else ITEM_TOKENS,
        "vocab_size": 32 if backbone else 0,
        "input_size": 0 if backbone else 4,
        "output_size": 0 if backbone else (WIDTH if role is Role.encoder else 4),
        "causal": backbone,
    }
    return ModuleConfig(name=name, role=role, **(sizes | changes))  # type: ignore[arg-type]


@st.composite
def workloads(draw: st.DrawFn) -> Workload:
    """1-3 encoders (the first may feed the second, and a generator), 0-2 generators; frozen, with experts, or not."""
    encoders = [module(f"encoder{i}", Role.encoder, **draw(settings())) for i in range(draw(st.integers(1, 3)))]
    generators = [module(f"generator{i}", Role.generator, **draw(settings())) for i in range(draw(st.integers(0, 2)))]
    backbone = module(BACKBONE, Role.backbone, **draw(settings()))
    edges = [Edge(source=e.name, target=BACKBONE, rows_per_item=ITEM_TOKENS, width=WIDTH) for e in encoders]
    edges += [Edge(source=BACKBONE, target=g.name, rows_per_item=ITEM_TOKENS, width=WIDTH) for g in generators]
    if len(encoders) > 1 and draw(st.booleans()):  # a chain, and so a module with two consumers
        edges.append(Edge(source="encoder0", target="encoder1", rows_per_item=ITEM_TOKENS, width=WIDTH))
    if generators and draw(st.booleans()):
        edges.append(Edge(source="encoder0", target="generator0", rows_per_item=ITEM_TOKENS, width=WIDTH))
    modules = [*encoders, backbone, *generators]
    if not any(m.is_trained for m in modules):
        modules = [replace(m, frozen=False) for m in modules]
    return Workload(name="random", modules=tuple(modules), edges=tuple(edges))


@st.composite
def settings(draw: st.DrawFn) -> dict[str, object]:
    """What a module may be beside its sizes."""
    found: dict[str, object] = {"frozen": draw(st.sampled_from([False, False, False, True]))}
    if draw(st.sampled_from([False, False, True])):
        found |= {"num_experts": 4, "moe_top_k": draw(st.integers(1, 2))}
    return found


@st.composite
def placements(draw: st.DrawFn, config: ModuleConfig, world_size: int) -> ModulePlan:
    """Any legal layout on any ranks."""
    axes = {axis: draw(st.sampled_from([1, 1, 2, 4])) for axis in ("tp", "cp", "pp")}
    while axes["tp"] * axes["cp"] * axes["pp"] > world_size:
        axes[max(axes, key=lambda axis: axes[axis])] //= 2
    splits = axes["tp"] > 1 and config.tokens_per_item % (2 * axes["cp"] * axes["tp"]) == 0
    if config.num_experts and not splits:
        axes["tp"] = 1
    dp = draw(st.integers(1, world_size // (axes["tp"] * axes["cp"] * axes["pp"])))
    if config.num_experts:
        per_stage = axes["tp"] * axes["cp"] * dp
        fits = [(ep, etp) for ep in (1, 2, 4) for etp in (1, 2) if per_stage % (ep * etp) == 0]
        axes["ep"], axes["etp"] = draw(st.sampled_from(fits))
    layout = Layout(**axes, dp=dp)
    return ModulePlan(
        ranks=RankSet.of(draw(st.permutations(range(world_size)))[: layout.num_ranks]),
        layout=layout,
        unit=draw(st.sampled_from([0, 0, 2, 3])) if config.role is Role.encoder else 0,
        sequence_parallel=splits and layout.tp > 1 and (config.num_experts > 0 or draw(st.booleans())),
        recompute=draw(st.sampled_from(Recompute)),
    )


@st.composite
def plans(draw: st.DrawFn, workload: Workload, max_world_size: int = 8) -> Plan:
    """A plan of the workload; ranks may be idle."""
    world_size = draw(st.integers(1, max_world_size))
    modules = {m.name: draw(placements(m, world_size)) for m in workload.modules}
    for edge in workload.edges:  # 1F1B: a consumer's unit is never longer than its producer's
        if (modules[edge.target].unit or 1) > (modules[edge.source].unit or 1):
            modules[edge.target] = replace(modules[edge.target], unit=modules[edge.source].unit)
    micro_batch_size = draw(st.integers(1, 3))
    microbatches = draw(st.integers(1, 4))
    plan = Plan(
        workload=workload.name,
        world_size=world_size,
        global_batch_size=micro_batch_size * modules[BACKBONE].layout.dp * microbatches,
        micro_batch_size=micro_batch_size,
        schedule=ScheduleChoice("1f1b"),
        modules=modules,
    )
    validate_plan(plan, workload)
    return plan


def bring_items(workload: Workload, num_samples: int, rng: np.random.Generator) -> Metadata:
    """Metadata of one microbatch: samples with 0-3 items for each module, of any length; rows at any place."""
    items = {BACKBONE: Items(np.arange(num_samples), np.full(num_samples, SEQUENCE))}
    for config in workload.modules:
        if config.role is not Role.backbone:
            counts = rng.integers(0, 3, num_samples)
            tokens = rng.integers(1, ITEM_TOKENS + 1, int(counts.sum()))
            items[config.name] = Items(np.repeat(np.arange(num_samples), counts), tokens)
    links = {(edge.source, edge.target): _link(edge, items, rng) for edge in workload.edges}
    return Metadata(items=items, links=links)


def _link(edge: Edge, items: dict[str, Items], rng: np.random.Generator) -> Links:
    """Each item of the non-backbone end once, somewhere in its sample; between two others, items of one sample."""
    columns: list[list[int]] = [[], [], [], [], []]
    if BACKBONE in (edge.source, edge.target):
        carried = items[edge.target if edge.source == BACKBONE else edge.source]
        taken: dict[int, int] = {}
        for item, (sample, tokens) in enumerate(zip(carried.samples.tolist(), carried.tokens.tolist(), strict=True)):
            start = taken.get(sample, 0) + int(rng.integers(0, 2))
            taken[sample] = start + tokens
            ends = [(item, 0), (sample, start)] if edge.target == BACKBONE else [(sample, start), (item, 0)]
            for column, value in zip(columns, [*ends[0], *ends[1], tokens], strict=True):
                column.append(value)
    else:
        source, target = items[edge.source], items[edge.target]
        for item, (sample, tokens) in enumerate(zip(target.samples.tolist(), target.tokens.tolist(), strict=True)):
            near = np.flatnonzero(source.samples == sample)
            if len(near):
                chosen = int(rng.choice(near))
                rows = min(tokens, int(source.tokens[chosen]))
                for column, value in zip(columns, [chosen, 0, item, tokens - rows, rows], strict=True):
                    column.append(value)
    return Links(*map(integers, columns))
