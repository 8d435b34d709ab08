"""Who waits for whom, as text: what an error about an order shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from megatron_mosaic.schedules.actions import Action

if TYPE_CHECKING:
    from megatron_mosaic.schedules.lane_work import LaneWork  # which shows its own errors with these

_AROUND = 3  # actions shown on either side


def render_order_violation(work: LaneWork, order: Sequence[Action], place: int) -> str:
    """The order around an action that comes too early or too late, an arrow below it, and what it waits for.

    order | ... llm.0F1 llm.0B0 [vision.0B0] llm.0B1 ...
            vision.0B0 waits for llm.0B1, 1 place later
    """
    action, before = order[place], {*order[:place]}
    shown = [str(a) if i != place else f"[{a}]" for i, a in enumerate(order)]
    low, high = max(0, place - _AROUND), place + _AROUND + 1
    dots = ("... " if low else "", " ..." if high < len(order) else "")
    lines = [f"order | {dots[0]}{' '.join(shown[low:high])}{dots[1]}"]
    if action in before:
        return "\n".join([*lines, f"        {action} stands there twice"])
    lane = work.lanes[action.lane]
    earlier = [a for a in lane[: lane.index(action)] if a not in before]
    for need in (*work.needs(action), *earlier[:1]):
        if need not in before:
            why = "its need" if need not in earlier else f"before it in lane {action.lane}"
            far = order.index(need, place) - place if need in order[place:] else 0
            where = f"{far} place{'s' * (far > 1)} later" if far else "nowhere in the order"
            lines.append(f"        {action} waits for {need} ({why}), {where}")
    return "\n".join(lines)


def render_deadlock(work: LaneWork, cursor: Mapping[str, int], done: set[Action]) -> str:
    """Every lane that stands still, where, and the needs that are not done.

    vision.0 | F0 F1 >B0< B1    waits for llm.0B0, of a lane that stands at llm.0F2
    """
    stuck = {lane: actions[cursor[lane]] for lane, actions in work.lanes.items() if cursor[lane] < len(actions)}
    width = max(map(len, stuck))
    lines = ["lanes that wait for each other:"]
    for lane, action in stuck.items():
        at = cursor[lane]
        row = render_row([str(a).removeprefix(lane) for a in work.lanes[lane]], at)
        needs = [need for need in work.needs(action) if need not in done]
        waits = ", ".join(f"{need} ({need.lane} stands at {stuck[need.lane]})" for need in needs)
        lines.append(f"{lane:<{width}} | {row}  waits for {waits}")
    return "\n".join(lines)


def render_row(names: Sequence[str], at: int) -> str:
    """A few names around one that is pointed at: `F0 F1 >B0< B1`."""
    first = max(0, at - _AROUND)
    return " ".join(f">{name}<" if i == at else name for i, name in enumerate(names[first : at + _AROUND + 1], first))
