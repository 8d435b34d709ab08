"""Layouts under each schedule beyond 1F1B, for the same check as the acceptance table's; written as there.

Of every schedule a few run always; with `-m slow` at least six do.
"""

from __future__ import annotations

from tests.numerics.acceptance_cases import (
    ANY,
    AROUND,
    BACKBONE,
    EXPERTS,
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
        **{module: f"{words} share0.5" for module, words in modules.items()},
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
    pair("interleaved", "0 unit2", "1-2 pp2 vpp2", schedule="interleaved", microbatches=6),
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
ALWAYS: list[Case] = [OVERLAP[1], WHOLE[0]]
SLOW: list[Case] = [each for each in [*OVERLAP, *INTERLEAVED, *WHOLE] if each not in ALWAYS]
