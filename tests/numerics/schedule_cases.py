"""Layouts under each schedule beyond 1F1B, for the same check as the acceptance table's; written as there.

Four run always, the rest with `-m slow`; three_phase and nested stand in acceptance_cases.py.
"""

from __future__ import annotations

from megatron_mosaic.plan.workload import Workload
from tests.numerics.acceptance_cases import (
    ANY,
    AROUND,
    BACKBONE,
    EXPERTS,
    MOE,
    NESTED,
    ONE,
    TWO,
    A,
    B,
    Case,
    G,
    case,
    frozen,
    pair,
    workload,
)

# Where lanes have tracks of their own: quotas on all modules of shared ranks
OVERLAP = [
    case(
        "overlap",
        name,
        model,
        schedule="overlap",
        microbatches=count,
        **{module: f"{words} share0.2" for module, words in modules.items()},
    )
    for name, model, count, modules in AROUND
]
INTERLEAVED = [
    case(
        "interleaved",
        "two encoders ahead",
        TWO,
        schedule="interleaved",
        microbatches=5,
        **{A: "0-1 dp2", B: "2-3 pp2 vpp2", BACKBONE: "0-3 pp2 vpp2 dp2"},
    ),
    case(
        "interleaved",
        "a generator behind",
        ANY,
        schedule="interleaved",
        microbatches=4,
        **{A: "0-1 dp2", BACKBONE: "0-3 tp2 pp2 vpp2", G: "2-3 pp2 vpp2"},
    ),
    pair("interleaved", "0-1 dp2", "0-1 pp2 vpp2", schedule="interleaved", microbatches=3),
    pair("interleaved", "0-1 tp2 vpp2", "0-1 pp2 vpp2", schedule="interleaved", microbatches=4),
    pair("interleaved", "0 unit2", "1-2 pp2 vpp2", schedule="interleaved", microbatches=6),
]
# Encoders in the backbone's bubbles, cut into layer ranges (vpp) on one rank
_BUBBLES: list[tuple[str, Workload, int, dict[str, str]]] = [
    ("layer ranges", ONE, 8, {A: "0-1 dp2 vpp2", BACKBONE: "0-1 pp2"}),
    ("long pipeline", ONE, 8, {A: "0-3 tp2 dp2 sp vpp2 unit2", BACKBONE: "0-3 pp4"}),
    ("a generator of two ranges", ANY, 5, {A: "0-3 dp4 vpp2", BACKBONE: "0-3 pp2 dp2", G: "0-3 tp2 dp2 vpp2"}),
    ("two encoders", TWO, 6, {A: "0-1 dp2 vpp4", B: "0-1 tp2 vpp2 unit1", BACKBONE: "0-1 pp2"}),
    ("virtual stages", ONE, 4, {A: "0-1 cp2 vpp2 whole", BACKBONE: "0-1 pp2 vpp2"}),
    ("chains, three consumers", *AROUND[4][1:]),
    ("experts", MOE, 4, {A: "0-1 dp2 ep2 vpp2 full", BACKBONE: "0-3 pp2 dp2 ep2"}),
    ("frozen, apart", frozen(ANY, A), 5, {A: "0 vpp2", BACKBONE: "1-2 pp2", G: "2-3 dp2 unit3"}),
    ("made in another order than asked for", ANY, 12, {A: "0 unit2", BACKBONE: "1", G: "0 unit2"}),
]
BUBBLE_FILL = [
    case("bubble_fill", name, model, schedule="bubble_fill", microbatches=count, **modules)
    for name, model, count, modules in _BUBBLES
]
# Forwards that leave no graph: on stages, chunks, experts, behind a projector
WHOLE = [
    pair("recompute whole", "0-1 dp2 whole", "0-1 tp2 whole sp", microbatches=4),
    pair("recompute whole", "0-1 pp2 whole", "0-3 pp2 vpp2 dp2 whole", schedule="interleaved", microbatches=4),
    case(
        "recompute whole",
        "experts, a generator, nested",
        workload((A, BACKBONE), (BACKBONE, G), backbone=EXPERTS, **{A: EXPERTS}),
        schedule="nested",
        microbatches=4,
        **{A: "0-1 dp2 ep2 whole", BACKBONE: "0-3 pp2 dp2 ep2 whole", G: "2-3 dp2 whole"},
    ),
    case(
        "recompute whole",
        "all but the projector",
        frozen(ONE, A, projector=True),
        **{A: "0-1 pp2 whole", BACKBONE: "0-1 dp2"},
    ),
]
ALWAYS: list[Case] = [OVERLAP[1], BUBBLE_FILL[0], BUBBLE_FILL[-1], WHOLE[0]]
UNGUARDED: list[Case] = [OVERLAP[1], INTERLEAVED[0], BUBBLE_FILL[-1], NESTED[4]]
SLOW: list[Case] = [each for each in [*OVERLAP, *INTERLEAVED, *BUBBLE_FILL, *WHOLE] if each not in ALWAYS]
