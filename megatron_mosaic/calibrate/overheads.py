"""What a real step takes beyond the parts that were measured alone: of each action, each sample, each step.

A run of every module on one rank, which waits for nobody, is laid beside what the profile predicts of it so far:

    ~data | actions, with what is between them | gradients, optimizer
      |          |                                  |
    sample_s   action_s: what is left, an action  step_s: what is left, a step

With these the profile predicts that run, on one thread as it was, to the bit, unless the run was faster than its parts
alone: what is left is then 0, not negative, and the prediction the longer one. Every other plan is predicted from it.
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron_mosaic.cost_model.hardware.profile import Overheads
from megatron_mosaic.cost_model.simulate import Simulation
from megatron_mosaic.errors import ProfileError
from megatron_mosaic.schedules.timeline import Span


def fit_overheads(simulation: Simulation, spans: Sequence[Span]) -> Overheads:
    """`simulation`: of the run's plan, on one rank, by a profile without overheads. `spans`: as the run took them.
    ProfileError for spans of another plan."""
    rows = sorted(spans, key=lambda span: span.start_s)
    actions = [span for span in rows if not span.label.startswith("~")]
    expected = [str(action) for action in simulation.program.schedule.order]
    labels = [rows[0].label, *[span.label for span in rows[-2:]]] if rows else []
    if [span.label for span in actions] != expected or labels != ["~data", "~grads", "~optimizer"]:
        raise ProfileError(
            "overheads",
            got=f"{len(actions)} actions, with {labels} around them",
            expected=f"{len(expected)} actions, with ~data before, ~grads and ~optimizer behind them",
            fix="report this: the calibration's run is not of its plan",
        )
    data, gradients, optimizer = rows[0], rows[-2], rows[-1]
    price = simulation.price
    predicted_s = max(simulation.end_s) - price.data_s
    acting_s = gradients.start_s - data.end_s
    tail_s = optimizer.end_s - gradients.start_s
    return Overheads(
        action_s=max(0.0, acting_s - predicted_s) / len(actions),
        step_s=max(0.0, tail_s - (simulation.step_s - max(simulation.end_s))),
        sample_s=(data.end_s - data.start_s) / price.work.num_samples,
    )
