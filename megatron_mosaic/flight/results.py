"""What Megatron finds in the numbers: a loss or gradient that is none ends the job, but only after it has tried again.

By then every rank leaves with the same exit status; who saw it first, and where, is known only now.
"""

from __future__ import annotations

import logging
import re
import time

from megatron_mosaic.flight.line import Flight
from megatron_mosaic.flight.verdict import stamp

_LOGGER = "megatron.core.rerun_state_machine"
_FATAL = re.compile(r"Unexpected result -?(nan|inf)\b")


class ResultWatch(logging.Handler):
    """Stamps this rank's verdict when Megatron says that a result is not a number; other results it may go on with."""

    def __init__(self, flight: Flight) -> None:
        super().__init__(logging.ERROR)
        self._flight = flight
        logging.getLogger(_LOGGER).addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if _FATAL.match(text):
            stamp(self._flight, at_ns=time.monotonic_ns(), follows=False, why=text)
