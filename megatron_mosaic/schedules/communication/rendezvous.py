"""Whether messages can block each other in the worst case: a communication kernel blocks its rank until all unmatched
transfers of that rank are matched, and a collective until all ranks of the lane are there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from megatron_mosaic.errors import ScheduleError
from megatron_mosaic.schedules.actions import Action
from megatron_mosaic.schedules.communication.transfers import Process, Slot, Transfer
from megatron_mosaic.schedules.pictures import render_row


def validate_rendezvous(programs: Mapping[Process, Sequence[Slot]]) -> None:
    """ScheduleError where programs wait for each other, if whoever posts transfers goes on only when all are matched,
    and an action runs only when every rank of its lane is at it."""
    run = _Rendezvous(programs)
    waiting = [*programs]
    while waiting:
        if run.advance(waiting.pop()):
            waiting = [*programs]
    if any(run.cursor[process] < len(program) for process, program in programs.items()):
        raise ScheduleError(
            "schedule: messages",
            got=run.render(),
            expected="no rank that waits for a rank that waits for it",
            fix="post receives where their sources stand in the order",
        )


class _Rendezvous:
    """How far every process is. `posted`: (transfer, it is the sender) -> by how many it is posted."""

    def __init__(self, programs: Mapping[Process, Sequence[Slot]]) -> None:
        self.programs = programs
        self.cursor = dict.fromkeys(programs, 0)
        self._ran: set[tuple[Process, int]] = set()  # slots whose action has run and whose transfers are posted
        self.posted: dict[tuple[Transfer, bool], int] = {}
        self._lanes = {
            process: {slot.action.lane for slot in program if slot.action is not None}
            for process, program in programs.items()
        }
        self._of_lane: dict[str, list[Process]] = {}
        for process, lanes in self._lanes.items():
            for lane in lanes:
                self._of_lane.setdefault(lane, []).append(process)

    def advance(self, process: Process) -> bool:
        """Go as far as it can; whether it went on at all."""
        went = False
        while self.cursor[process] < len(self.programs[process]):
            at = process, self.cursor[process]
            slot = self.programs[process][at[1]]
            if at not in self._ran:
                if slot.action is not None and self.absent(slot.action):
                    return went
                peers = [process] if slot.action is None else self._of_lane[slot.action.lane]
                for peer in peers:  # all of them run it
                    self._run(peer)
                went = True
            if self.unmatched(process):
                return went
            self.cursor[process] += 1
            went = True
        return went

    def absent(self, action: Action) -> list[Process]:
        """Those of the action's lane that are not at it yet."""
        return [
            peer
            for peer in self._of_lane[action.lane]
            if self.cursor[peer] >= len(self.programs[peer]) or self.programs[peer][self.cursor[peer]].action != action
        ]

    def unmatched(self, process: Process) -> list[Transfer]:
        """What the process has posted in its slot, and somebody on the other side has not."""
        found, lanes = [], self._lanes[process]
        for transfer in self.programs[process][self.cursor[process]].posts:
            ends = (transfer.source.lane in lanes, transfer.target.lane in lanes)
            for here, lane, sends in zip(ends, (transfer.target.lane, transfer.source.lane), (False, True)):
                if here and self.posted.get((transfer, sends), 0) < len(self._of_lane[lane]):
                    found.append(transfer)
        return found

    def _run(self, process: Process) -> None:
        slot, lanes = self.programs[process][self.cursor[process]], self._lanes[process]
        self._ran.add((process, self.cursor[process]))
        for transfer in slot.posts:
            for lane, sends in ((transfer.source.lane, True), (transfer.target.lane, False)):
                if lane in lanes:
                    self.posted[transfer, sends] = self.posted.get((transfer, sends), 0) + 1

    def render(self) -> str:
        """Every process that stands still: where, and what it waits for."""
        lines = ["ranks that wait for each other:"]
        for process, program in self.programs.items():
            at = self.cursor[process]
            if at == len(program):
                continue
            names = ["start" if slot.action is None else str(slot.action) for slot in program]
            if (process, at) in self._ran:
                transfers = self.unmatched(process)
                waits = ", ".join(map(str, transfers[:3])) + (", ..." if len(transfers) > 3 else "")
                reason = f"is done, waits until both sides have posted {waits}"
            else:
                reason = "waits for the other ranks of its lane"
            title = f"class {process[0]}" + (f" track {process[1]}" if process[1] else "")
            lines.append(f"{title} ({', '.join(sorted(self._lanes[process]))}) | {render_row(names, at)}  {reason}")
        return "\n".join(lines)
