"""Layouts that a heterogeneous runtime has to run, by where they come from. Read by test_acceptance.py and a script.

Names are those of megatron-core's tests at tag core_v0.19.0 and of Megatron-Bridge's sweeps. What upstream refuses is
here too: nothing is refused for its layout. Written module = "ranks tpT cpC ppP dpD epE ... [flags]".
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from megatron_mosaic.plan import Layout, ModulePlan, Plan, Quota, RankSet, Recompute, ScheduleChoice
from megatron_mosaic.plan.workload import Edge, Role, Workload
from tests.worlds import BACKBONE, ITEM_TOKENS, WIDTH, module

_AXIS = re.compile(r"(tp|cp|pp|vpp|dp|ep|etp|unit)([0-9]+)")
_SHARE = re.compile(r"share([0-9.]+)")
A, B, G, H = "image", "audio", "generator", "speech"


def edge(source: str, target: str) -> Edge:
    return Edge(source=source, target=target, rows_per_item=ITEM_TOKENS, width=WIDTH)


def workload(
    *edges: tuple[str, str], layers: int = 4, backbone: dict[str, object] | None = None, **changes: dict[str, object]
) -> Workload:
    """Encoders and generators around the backbone, by their edges; `changes` are sizes of single modules."""
    names = list(dict.fromkeys(name for pair in edges for name in pair if name != BACKBONE))
    before = [name for name in names if any(pair == (name, BACKBONE) for pair in edges)]
    after = [name for name in names if name not in before]
    encoders = [module(name, Role.encoder, **changes.get(name, {})) for name in before]
    generators = [module(name, Role.generator, **changes.get(name, {})) for name in after]
    middle = module(BACKBONE, Role.backbone, **({"num_layers": layers} | (backbone or {})))
    return Workload(
        name="made-up", modules=(*encoders, middle, *generators), edges=tuple(edge(*pair) for pair in edges)
    )


ONE = workload((A, BACKBONE))
TWO = workload((A, BACKBONE), (B, BACKBONE))
ANY = workload((A, BACKBONE), (BACKBONE, G))
FOUR = workload((A, BACKBONE), (B, BACKBONE), (BACKBONE, G))
# image feeds the backbone, the audio encoder and the generator: three consumers, one of them in a chain
WEB = workload((A, B), (A, BACKBONE), (B, BACKBONE), (BACKBONE, G), (BACKBONE, H), (A, G))
EXPERTS: dict[str, object] = {"num_experts": 4, "moe_top_k": 2}
MOE = workload((A, BACKBONE), backbone=EXPERTS, **{A: EXPERTS})


def placed(text: str) -> ModulePlan:
    """`"0-3 tp2 dp2 sp full unit2 share0.5"`."""
    ranks, *words = text.split()
    axes = {match[1]: int(match[2]) for word in words if (match := _AXIS.fullmatch(word))}
    shares = [float(match[1]) for word in words if (match := _SHARE.fullmatch(word))]
    flags = {word for word in words if not _AXIS.fullmatch(word) and not _SHARE.fullmatch(word)}
    assert flags <= {"sp", "full", "selective", "whole"}, flags
    unit = axes.pop("unit", 0)
    recompute = next((Recompute(flag) for flag in flags if flag != "sp"), Recompute.none)
    return ModulePlan(
        ranks=RankSet.parse(ranks),
        layout=Layout(**axes),
        quota=Quota(share=shares[0] if shares else 1.0),
        unit=unit,
        recompute=recompute,
        sequence_parallel="sp" in flags,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One plan of one workload, with Megatron arguments."""

    group: str
    name: str
    workload: Workload
    plan: Plan
    args: tuple[str, ...] = ()

    @property
    def id(self) -> str:
        return f"{self.group} {self.name}"


def case(
    group: str,
    name: str,
    model: Workload,
    *,
    mbs: int = 2,
    microbatches: int = 2,
    world: int = 0,
    schedule: str = "1f1b",
    args: tuple[str, ...] = (),
    **modules: str,
) -> Case:
    made = {m.name: placed(modules[m.name]) for m in model.modules}
    size = world or 1 + max(m.ranks.ranks[-1] for m in made.values())
    plan = Plan(
        workload=model.name,
        world_size=size,
        global_batch_size=mbs * made[BACKBONE].layout.dp * microbatches,
        micro_batch_size=mbs,
        schedule=ScheduleChoice(schedule),
        modules=made,
    )
    return Case(group=group, name=name, workload=model, plan=plan, args=args)


def frozen(model: Workload, *names: str, projector: bool = False) -> Workload:
    modules = [
        replace(m, frozen=m.name in names, trains_projector=projector and m.name in names) for m in model.modules
    ]
    return replace(model, modules=tuple(modules))


def pair(group: str, image: str, llm: str, **more: object) -> Case:
    """An encoder and a backbone."""
    return case(group, f"{image} -> {llm}", ONE, image=image, llm=llm, **more)  # type: ignore[arg-type]


COLOCATED = [
    pair("2.1", "0-7 tp2 dp4", "0-7 tp4 dp2"),
    pair("2.1", "0-7 tp4 dp2", "0-7 tp2 dp4"),
    pair("2.1", "4-7 tp2 dp2", "4-7 dp4"),
    pair("2.1 refused upstream", "0-3 pp2 dp2", "0-3 dp4"),
    pair("2.1 refused upstream", "0-3 cp2 dp2", "0-3 tp2 cp2"),
    pair("2.1 refused upstream", "0-5 dp6", "0-5 pp2 dp3"),
    pair("2.1 refused upstream", "0-7 dp8", "4-7 tp2 dp2"),
    pair("2.1 refused upstream", "0-3 dp4", "4-7 tp2 dp2"),
    pair("2.1 refused upstream", "0-1 dp2", "0-1 dp2", mbs=3),
    pair("2.2", "0-7 tp2 dp4", "0-7 tp4 dp2", microbatches=1),
    pair("2.2", "0-7 tp4 dp2", "0-7 tp2 dp4", microbatches=4),
]
DISJOINT = [
    pair("2.3", "0", "1", microbatches=4),
    case("2.3", "0 -> 1-3 pp3", workload((A, BACKBONE), layers=3), image="0", llm="1-3 pp3", microbatches=4),
    case("2.3", "0-1 tp2 -> 2-7 tp2 pp3", workload((A, BACKBONE), layers=3), image="0-1 tp2", llm="2-7 tp2 pp3"),
    pair("2.3", "0-3 tp2 pp2", "4-7 tp2 pp2", microbatches=4),
    pair("2.3", "0-3 dp4", "4-7 tp2 pp2", mbs=4),
    pair("2.3", "0-3 tp2 pp2", "4-7 dp4", mbs=1),
    case("2.3", "0-1 dp2 -> 2-7 tp2 pp3", workload((A, BACKBONE), layers=3), image="0-1 dp2", llm="2-7 tp2 pp3"),
    pair("2.3 refused upstream", "0-3 dp4", "4-7 cp2 pp2"),
    pair("2.4a", "0-3 tp2 dp2", "4-7 tp2 dp2"),
    pair("2.4a", "0-3 tp2 dp2", "4-7 tp4"),
    pair("2.4a", "0-3 tp4", "4-7 tp2 dp2"),
    pair("2.4a", "0-1 tp2", "2-3 tp2"),
    pair("2.4a", "0-3 dp4", "4-7 tp4"),
    pair("2.4a", "0-3 tp4", "4-7 dp4"),
    pair("2.4a", "0-3 tp2 pp2", "4-7 dp4"),
    pair("2.4a", "0-3 tp4", "4-7 pp4"),
]
GRAPHS = [
    case("2.4b", "generator tp2", FOUR, image="0", audio="1", llm="2-5 tp2 pp2", generator="6-7 tp2"),
    case("2.4b", "generator dp2", FOUR, image="0", audio="1", llm="2-5 tp2 pp2", generator="6-7 dp2"),
    case("2.4b", "llm pp4", TWO, image="0-1 pp2", audio="2-3 tp2", llm="4-7 pp4"),
    pair("2.4b", "0-1 tp2", "2-5 tp2 pp2"),
    pair("2.4b", "0-3 tp2 dp2", "4-7 tp4"),
    case("2.4c", "two encoders on one rank", TWO, image="0", audio="0", llm="1"),
    case("2.4c", "two encoders tp2 pp2", TWO, image="0-3 tp2 pp2", audio="0-3 tp2 pp2", llm="4-7 tp2 pp2"),
    case(
        "2.5a", "0-1 tp2 -> 2-7 tp2 pp3", workload((A, BACKBONE), layers=6), image="0-1 tp2", llm="2-7 tp2 pp3", mbs=1
    ),
    case("2.5a", "0 -> 1-7 pp7", workload((A, BACKBONE), layers=7), image="0", llm="1-7 pp7", microbatches=3),
    pair("2.5a refused upstream", "0-3 dp4", "2-5 tp2 dp2"),
    pair("2.5a refused upstream", "0-1 dp2", "4-5 tp2", world=8),
    case("2.5b", "llm ep4 of tp2 dp2", MOE, image="0-3 tp2 dp2 sp", llm="4-7 tp2 dp2 ep4 sp"),
    case("2.5b", "llm ep2 etp2", MOE, image="0-3 dp4 ep4", llm="4-7 tp2 dp2 ep2 etp2 sp"),
]
BRIDGE = [  # image is the sweeps' vision
    pair("2.6", "4-7 tp4", "0-3 tp4"),
    pair("2.6", "4-7 tp2 dp2", "0-3 tp2 dp2"),
    pair("2.6", "4-7 tp4", "0-3 tp2 pp2"),
    pair("2.6", "4-7 dp4", "0-3 dp4"),
    pair("2.6", "4-7 tp4", "0-3 pp4"),
    pair("2.6", "4-7 dp4", "0-3 pp4"),
    pair("2.6", "4-7 tp2 dp2", "0-3 pp2 dp2"),
    pair("2.6", "4-7 dp4", "0-3 tp4"),
    pair("2.6", "4-7 dp4", "0-3 tp2 dp2"),
    pair("2.6", "2-7 tp2 dp3", "0-1 pp2", mbs=3),
    pair("2.6", "2-7 tp2 dp3", "0-1 tp2", mbs=3),
    pair("2.6", "2-3 dp2", "0-1 dp2"),
    case("2.6", "llm tp4, image tp2, audio tp2", TWO, llm="0-3 tp4", image="4-5 tp2", audio="6-7 tp2"),
    case("2.6", "llm tp2, image dp3, audio dp3", TWO, llm="0-1 tp2", image="2-4 dp3", audio="5-7 dp3", mbs=3),
]
OURS = [
    pair("2.7.1 partial overlap", "0-3 dp4", "0-7 tp2 dp4"),
    pair("2.7.1 partial overlap", "0-5 dp6", "2-7 tp2 dp3"),
    case("2.7.1", "nested in nested", TWO, audio="0-1 dp2", image="0-3 tp2 dp2", llm="0-7 tp2 pp2 dp2"),
    pair("2.7.2 llm pp2 beside its encoder", "0-3 dp4", "0-3 tp2 pp2", microbatches=4),
    pair("2.7.3 dp 3 to 2", "0-2 dp3", "0-1 dp2"),
    pair("2.7.3 dp 3 to 2", "0-2 dp3", "3-4 dp2"),
    pair("2.7.4 cp to cp", "0-3 cp2 dp2", "0-3 tp2 cp2 sp"),
    pair("2.7.4 cp and pp", "0-3 cp2 pp2", "0-3 cp2 pp2"),
    case("2.7.4", "encoder ep2", MOE, image="0-3 dp4 ep2", llm="0-3 cp2 dp2 ep2"),
    case("2.7.5", "generator with gradients back", ANY, image="0-1 dp2", llm="0-3 tp2 dp2", generator="2-3 tp2"),
    case(
        "2.7.5",
        "a web of modules",
        WEB,
        image="0-3 dp4",
        audio="0-2 dp3",
        llm="0-3 tp2 pp2",
        generator="1,3 tp2",
        speech="2-3 pp2",
    ),
    case(
        "2.7.6",
        "hardly any image",
        workload((A, BACKBONE), image={"items_per_sample": 0.1}),
        image="0-3 dp4",
        llm="0-3 tp2 dp2",
        microbatches=4,
    ),
    case(
        "2.7.6",
        "hardly any image, experts wait for each other",
        workload((A, BACKBONE), backbone=EXPERTS, image={"items_per_sample": 0.15, **EXPERTS}),
        image="0-3 pp2 dp2 ep2",
        llm="0-3 dp4 ep4",
        mbs=1,
        microbatches=4,
    ),
    case(
        "2.7.7",
        "many images of any length",
        workload((A, BACKBONE), image={"items_per_sample": 3.0}),
        image="0-2 dp3",
        llm="0-3 tp4",
        mbs=3,
    ),
    pair("2.7.8 unit of 2", "0-3 dp4 unit2", "0-3 tp2 dp2", microbatches=4),
    pair("2.7.8 unit of 3", "0-1 cp2 unit3", "0-3 tp2 pp2", microbatches=4),
    pair("2.7.9 mean over samples", "0-3 cp2 dp2", "0-3 cp2 dp2", args=("--loss-mean-over", "samples")),
    case(
        "2.7.9",
        "mean over samples and drawings",
        ANY,
        image="0-1 dp2",
        llm="0-3 dp4",
        generator="2-3 cp2",
        args=("--loss-mean-over", "samples"),
    ),
    pair("2.7.10 recompute full", "0-3 dp4 full", "0-3 tp2 dp2 full"),
    pair("2.7.10 recompute selective", "0-3 tp2 dp2 selective sp", "0-3 cp2 dp2 selective"),
    case("frozen", "encoder", frozen(ANY, A), image="0-1 pp2", llm="0-3 tp2 dp2", generator="3"),
    case("frozen", "all but the projector", frozen(ONE, A, projector=True), image="0-1 pp2", llm="0-3 tp2 dp2"),
    case("frozen", "backbone", frozen(ANY, BACKBONE), image="0-1 dp2", llm="0-3 pp2 dp2", generator="2-3 tp2"),
    case("frozen", "all but the generator", frozen(ANY, A, BACKBONE), image="0", llm="0-1 pp2", generator="1-2 dp2"),
    pair("virtual stages", "0-3 dp4", "0-3 pp2 vpp2 dp2", schedule="interleaved", microbatches=4),
    pair("virtual stages", "0-3 pp2 vpp2 tp2", "0-3 tp2 pp2 vpp2 sp", schedule="interleaved", microbatches=3),
    pair("sequence parallel", "0-3 tp2 cp2 sp", "0-3 tp4 sp"),
    case("experts", "tp2 ep1 etp1", MOE, image="0-3 tp2 dp2 sp", llm="0-3 tp2 dp2 sp"),
    case("experts", "cp2 pp2 ep2", MOE, image="0-3 cp2 dp2 ep2", llm="0-3 cp2 pp2 ep2"),
    case(
        "gated, grouped queries",
        "tp2",
        workload(
            (A, BACKBONE),
            backbone={"gated": True, "num_query_groups": 2},
            image={"gated": True, "num_query_groups": 2},
        ),
        image="0-3 tp2 dp2",
        llm="0-3 tp2 cp2",
    ),
    pair("learning rates", "0-2 dp3", "0-3 tp2 dp2", args=("--mosaic-lr-mult", "image=0.1", "llm=3")),
    pair("overlapped sums", "0-2 dp3", "0-3 pp2 dp2", args=("--overlap-grad-reduce",)),
    pair(
        "overlapped sums, distributed optimizer",
        "0-2 dp3",
        "0-3 pp2 dp2",
        args=("--overlap-grad-reduce", "--use-distributed-optimizer"),
    ),
    case(
        "distributed optimizer",
        "experts",
        MOE,
        image="0-3 dp4 ep2",
        llm="0-3 tp2 dp2 ep2 sp",
        args=("--use-distributed-optimizer",),
    ),
    pair("scattered ranks", "0,2,5,7 tp2 dp2", "1,3,4,6 cp2 pp2"),
]
# Units of several microbatches nested around the pipeline: the encoder's forwards run ahead, a generator's turn back
AROUND: list[tuple[str, Workload, int, dict[str, str]]] = [
    ("pp1", ANY, 4, {A: "0-1 dp2", BACKBONE: "0-1 tp2", G: "1"}),
    ("pp2", ANY, 8, {A: "0-3 dp4", BACKBONE: "0-3 pp2 dp2", G: "0-3 tp2 dp2"}),
    ("pp4, a ragged end", ONE, 7, {A: "0-3 tp2 dp2 unit2", BACKBONE: "0-3 pp4"}),
    ("virtual stages", ANY, 4, {A: "0-1 dp2", BACKBONE: "0-3 pp2 vpp2 dp2", G: "2-3 dp2"}),
    ("chains, three consumers", WEB, 4, {A: "0-1 dp2", B: "2 unit3", BACKBONE: "0-1 pp2", G: "2-3 dp2", H: "0"}),
    ("frozen encoder, apart", frozen(ANY, A), 5, {A: "0", BACKBONE: "1-2 pp2", G: "2-3 dp2 unit3"}),
]
NESTED = [
    case(schedule, name, model, schedule=schedule, microbatches=count, **modules)
    for schedule in ("nested", "three_phase")
    for name, model, count, modules in AROUND
]
CASES = [*COLOCATED, *DISJOINT, *GRAPHS, *BRIDGE, *OURS, *NESTED]
