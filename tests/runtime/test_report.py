"""Who looks on in one process: the plain parts."""

import pytest

from megatron_mosaic.runtime.activation_meter import ActivationMeter
from megatron_mosaic.runtime.report import Observers, UnitStatistics


def test_unit_statistics_by_hand() -> None:
    """Of three vision units one was empty; owners would have had 2 and 1 times the mean on the busiest slot."""
    units = UnitStatistics(("vision", "llm"))
    units.note("vision", num_empty=0, imbalance=(2.0, 1.5))
    units.note("vision", num_empty=0, imbalance=(1.0, 1.0))
    units.note("vision", num_empty=1, imbalance=(1.5, 1.25))
    assert units.measures() == {
        "empty_units_by_module": {"vision": 1, "llm": 0},
        "imbalance_by_owner": {"vision": 1.5},
        "imbalance_by_module": {"vision": 1.25},
    }


def test_nobody_looks_on_without_observers() -> None:
    nobody, meter = Observers(), ActivationMeter()
    with nobody.forward("llm", 0):
        pass
    nobody.backward("llm", 0)
    nobody.losses(1, {"lm loss": 1.0})
    nobody.finished_gradients(None, None)
    nobody.finished_step(
        1, lambda: pytest.fail("asked for spans that nobody keeps"), lambda: pytest.fail("asked for bytes")
    )
    nobody.finished_training(None)
    nobody.finish(["llm"], 0.0)
    assert nobody.measures(["llm"]) == {"peak_activation_bytes_by_module": {"llm": 0}}
    somebody = Observers(meter=meter)
    with somebody.forward("llm", 0):
        pass
    somebody.backward("llm", 0)
    assert meter.peak_bytes == {"llm": 0}
