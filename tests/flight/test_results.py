"""What Megatron says of a result that is not a number becomes the rank's verdict; of others, it may go on."""

import inspect
import logging

from megatron.core import rerun_state_machine

from megatron_mosaic.flight.line import Flight
from megatron_mosaic.flight.results import ResultWatch
from megatron_mosaic.flight.verdict import read_verdicts


def test_the_rank_that_saw_it_first_is_stamped(tmp_path) -> None:
    flight = Flight(1, str(tmp_path))
    watch = ResultWatch(flight)
    try:
        flight.note("step 3 lane ~grads action ~grads")
        logger = logging.getLogger(rerun_state_machine.__name__)
        logger.error("Unexpected result 3.7e4 on rank 1 at iteration #4 invocation #1 (message='loss spike')")
        assert read_verdicts(tmp_path) == []
        logger.error("Unexpected result nan on rank 1 at iteration #4 invocation #1 (message='found NaN in ...')")
        flight.note("after step 3 lane ~save action ~save")
        (verdict,) = read_verdicts(tmp_path)
    finally:
        logger.removeHandler(watch)
    assert (verdict.cause, verdict.words) == (1, "step 3 lane ~grads action ~grads")
    assert verdict.why.startswith("Unexpected result nan")


def test_megatron_still_says_it_in_these_words() -> None:
    source = inspect.getsource(rerun_state_machine)
    assert "Unexpected result {" in source
    assert rerun_state_machine.logger.name == "megatron.core.rerun_state_machine"
