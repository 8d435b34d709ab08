"""One fault in one rank at one moment of a training run of the reference model. As a script, a torchrun worker.

The moment is given by the words that the rank notes in its flight: they name set-up, action and save alike.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron_mosaic.any2any import pretrain
from megatron_mosaic.flight.line import Flight

VARIABLE = "MOSAIC_TEST_FAULT"
MADE_UP = "made up by a test"


@dataclass(frozen=True, kw_only=True)
class Fault:
    """`kind`: a key of FIRE, fired on `rank` when its words first match `moment`. `mark`: the file that says when."""

    kind: str
    rank: int
    moment: str
    mark: str

    def as_environment(self) -> dict[str, str]:
        return {VARIABLE: json.dumps(asdict(self))}


def main() -> int:
    """The pretraining script with the fault of the environment."""
    install(Fault(**json.loads(os.environ[VARIABLE])))
    return pretrain.main()


def install(fault: Fault) -> None:
    """Let this process suffer the fault, if it is that rank."""
    Path(f"{fault.mark}.pid-{os.environ['RANK']}").write_text(str(os.getpid()))
    if int(os.environ["RANK"]) != fault.rank:
        return
    note: Callable[[Flight, str], None] = Flight.note
    fired: list[str] = []

    def note_and_fail(self: Flight, text: str) -> None:
        note(self, text)
        if not fired and re.match(fault.moment, text):
            fired.append(text)
            Path(fault.mark).write_text(str(time.monotonic()))
            FIRE[fault.kind]()

    Flight.note = note_and_fail


def _raise() -> None:
    raise ArithmeticError(MADE_UP)


def _poison() -> None:
    """From now on no loss of this rank is a number."""
    sound = pretrain.loss_func

    def poisoned(output):
        loss, count, report = sound(output)
        return None if loss is None else loss * float("nan"), count, report

    pretrain.loss_func = poisoned


def _slow_down() -> None:
    """From now on what lies between two notes takes five times its computing time, and a twentieth of a second more."""
    note, computed = Flight.note, [time.thread_time()]

    def note_slowly(self: Flight, text: str) -> None:
        time.sleep(0.05 + 4 * (time.thread_time() - computed[0]))
        computed[0] = time.thread_time()
        note(self, text)

    Flight.note = note_slowly


FIRE: dict[str, Callable[[], object]] = {
    "SIGKILL": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "SIGSTOP": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "hang": lambda: time.sleep(1000),
    "raise": _raise,
    "NaN": _poison,
    "slow": _slow_down,
    "none": lambda: None,
}

if __name__ == "__main__":
    sys.exit(main())
