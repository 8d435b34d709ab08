"""Sums of losses against plain Python."""

import torch

from megatron_mosaic.runtime.loss_sums import LossSums

SUMS = LossSums(names=("lm loss", "generator loss"))


def test_sums_of_several_forwards() -> None:
    """Two forwards of the llm (3 and 5 tokens), one of the generator (2), each over its own tokens; all trained."""
    rows = [
        SUMS.of(torch.tensor(6.0), 3, {"lm loss": torch.tensor([6.0, 3.0])}),
        SUMS.of(torch.tensor(2.0), 5, {"lm loss": torch.tensor([2.0, 5.0])}),
        SUMS.of(torch.tensor(0.5), 2.0, {"generator loss": torch.tensor([1.0, 2.0])}),
    ]
    totals = SUMS.zeros()
    for row in rows:
        totals += row
    assert totals.tolist() == [10.0, 8.5, 8.0, 8.0, 1.0, 2.0]
    assert SUMS.divisor(totals) == 10.0
    assert SUMS.means(totals) == {"loss": 0.85, "lm loss": 1.0, "generator loss": 0.5}
    reported = {name: row.tolist() for name, row in SUMS.as_reported(totals).items()}
    assert reported == {"lm loss": [8.0, 8.0], "generator loss": [1.0, 2.0]}


def test_a_step_without_loss_tokens_divides_by_one() -> None:
    nothing = SUMS.zeros()
    assert SUMS.divisor(nothing) == 1.0
    assert SUMS.means(nothing) == {"loss": 0.0, "lm loss": 0.0, "generator loss": 0.0}
    assert SUMS.as_reported(nothing)["lm loss"].tolist() == [0.0, 1.0]
