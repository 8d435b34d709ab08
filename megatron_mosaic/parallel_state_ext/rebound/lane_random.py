"""torch's CPU generator, once for every lane that runs in a thread of its own. Installed where
lanes run beside each other on a CPU (lane_state).

torch has one CPU generator a process, so two threads would draw from each other's stream. Inside `own_generator` the
thread's state and its draws are those of a generator of its own; everybody else sees torch as it is. A draw that takes
no generator (`torch.rand_like`, a fused dropout) still moves the process's: `no_shared_draws` finds it.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor

from megatron_mosaic.errors import RankFailure

_DRAWS = ("rand", "randn", "randint", "randperm", "bernoulli", "multinomial", "normal")
_DRAWS_IN_PLACE = ("bernoulli_", "uniform_", "normal_", "random_", "exponential_")


class _OfThread(threading.local):
    """The generators of this thread's `own_generator`s, innermost last."""

    def __init__(self) -> None:
        self.generators: list[torch.Generator] = []


_of_thread = _OfThread()


@contextlib.contextmanager
def own_generator() -> Iterator[torch.Generator]:
    """In the body, this thread draws from a generator of its own."""
    _of_thread.generators.append(torch.Generator())
    try:
        yield _of_thread.generators[-1]
    finally:
        _of_thread.generators.pop()


@contextlib.contextmanager
def no_shared_draws() -> Iterator[None]:
    """RankFailure if the process's generator moves while the body runs: two lanes would share its stream."""
    before = torch.default_generator.get_state()
    yield
    if not torch.equal(before, torch.default_generator.get_state()):
        raise RankFailure(
            "random numbers of lanes that run at the same time",
            got="a draw from the process's own CPU generator, whose order is a race",
            expected=f"F.dropout, or draws that take a generator: torch.{', '.join(_DRAWS)}",
            fix="draw with one of these in the module's code, or let its lanes take turns",
        )


@functools.cache
def install() -> None:
    """Let torch's draws and states be those of the thread's own generator where it has one. Once a process."""
    functional.dropout = _dropout(functional.dropout)
    for name in _DRAWS:
        setattr(torch, name, _drawing(getattr(torch, name)))
    for name in _DRAWS_IN_PLACE:
        setattr(Tensor, name, _drawing(getattr(Tensor, name)))
    get, put = torch.get_rng_state, torch.set_rng_state

    def get_rng_state() -> Tensor:
        return _of_thread.generators[-1].get_state() if _of_thread.generators else get()

    def set_rng_state(new_state: Tensor) -> None:
        if _of_thread.generators:
            _of_thread.generators[-1].set_state(new_state)
        else:
            put(new_state)

    for module in (torch, torch.random):
        module.get_rng_state, module.set_rng_state = get_rng_state, set_rng_state


def _drawing(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def draw(*args: Any, **kwargs: Any) -> Any:
        if _of_thread.generators and kwargs.get("generator") is None:
            kwargs["generator"] = _of_thread.generators[-1]
        return function(*args, **kwargs)

    return draw


def _dropout(stock: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(stock)
    def dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        """As torch's on a CPU, to the bit (aten's `_dropout_impl`), from the thread's generator."""
        if not _of_thread.generators or not training or not 0 < p < 1 or not input.numel():
            return stock(input, p, training, inplace)
        noise = torch.empty_like(input).bernoulli_(1 - p, generator=_of_thread.generators[-1]).div_(1 - p)
        return input.mul_(noise) if inplace else input * noise

    return dropout
