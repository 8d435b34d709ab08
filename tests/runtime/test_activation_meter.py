"""Saved bytes against what each operation's derivative is known to need."""

import torch
from torch import nn

from megatron_mosaic.runtime.activation_meter import ActivationMeter

X_BYTES = 6 * 4 * 4


def leaf() -> torch.Tensor:
    return torch.ones(6, 4, requires_grad=True)


def test_a_tensor_saved_twice_counts_once() -> None:
    """x * x saves x for both factors; its view x[:3] lives in the same storage."""
    meter, x = ActivationMeter(), leaf()
    with meter.forward("vision", 0):
        (x * x).sum() + (x[:3] * x[:3]).sum()
    assert meter.peak_bytes == {"vision": X_BYTES}


def test_parameters_do_not_count() -> None:
    """A linear layer saves its input and its weight: only the input is an activation."""
    meter, layer = ActivationMeter(), nn.Linear(4, 9)
    meter.ignore(layer)
    with meter.forward("vision", 0):
        layer(leaf())
    assert meter.peak_bytes == {"vision": X_BYTES}


def test_what_needs_no_derivative_saves_nothing() -> None:
    meter = ActivationMeter()
    with meter.forward("llm", 0), torch.no_grad():
        leaf() * leaf()
    assert meter.peak_bytes == {"llm": 0}


def test_what_is_kept_beside_the_graph_counts_and_a_second_run_takes_the_place_of_the_first() -> None:
    meter, given = ActivationMeter(), torch.ones(8)
    for unit in (0, 1):
        with meter.forward("vision", unit, [given[:4], given]), torch.no_grad():
            leaf() * leaf()
    assert meter.peak_bytes == {"vision": 2 * 8 * 4}
    with meter.forward("vision", 0, [given]):
        x = leaf()
        x * x
    assert meter.peak_bytes == {"vision": 2 * 8 * 4 + X_BYTES}
    meter.backward("vision", 0)


def test_the_peak_is_over_live_units_of_each_module() -> None:
    meter = ActivationMeter()
    outputs = []  # alive, as in a run: freed storages would be reused

    def forward(module: str, unit: int) -> None:
        with meter.forward(module, unit):
            x = leaf()
            outputs.append(x * x)

    forward("vision", 0)
    forward("vision", 1)
    forward("llm", 0)
    meter.backward("vision", 0)
    forward("vision", 2)
    assert meter.peak_bytes == {"vision": 2 * X_BYTES, "llm": X_BYTES}
    forward("vision", 3)
    assert meter.peak_bytes == {"vision": 3 * X_BYTES, "llm": X_BYTES}
