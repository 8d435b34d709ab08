"""Layouts under each schedule beyond 1F1B, for the same check as the acceptance table's; written as there.

Of every schedule a few run always; with `-m slow` at least six do.
"""

from __future__ import annotations

from tests.numerics.acceptance_cases import ANY, AROUND, BACKBONE, TWO, A, B, Case, G, case, pair

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
ALWAYS: list[Case] = [OVERLAP[1]]
SLOW: list[Case] = [each for each in [*OVERLAP, *INTERLEAVED] if each not in ALWAYS]
