"""What a script says of its model and of a batch, taken down without running any of it.

record_model(provider)    the class that the provider builds, with which arguments, and what it freezes
CallRecorder              stands in for the model in the script's forward_step and keeps the call
LossFunction              the script's `partial(loss_func, loss_mask)`, for the mask of any of the samples
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.transformer import MegatronModule
from torch import Tensor, nn

from megatron_mosaic.errors import ConfigError
from megatron_mosaic.parallel_state_ext.rebound.rebind import rebound_construction

Provider = Callable[..., Any]
ListParts = Callable[[Mapping[str, Any]], Sequence[str]]  # of a constructor's arguments: dotted names


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelRecord:
    """One model that a provider builds: its class, the arguments of its constructor, and part -> is it frozen."""

    kind: type
    arguments: Mapping[str, Any]
    frozen: Mapping[str, bool]


class _UnknownModel(Exception):
    """Leaves a provider that begins to build what no adapter knows."""


def record_model(provider: Provider, kinds: Mapping[type, ListParts]) -> ModelRecord:
    """What the provider builds. `kinds`: classes that are known, and which of their parts may be frozen.

    ConfigError for any other class, found before a parameter is made. Needs a world.
    """
    records: list[tuple[type, dict[str, Any]]] = []

    def recorder(kind: type, stock: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(stock)

        def record(self: MegatronModule, *args: Any, **kwargs: Any) -> None:
            bound = signature.bind(self, *args, **kwargs)
            bound.apply_defaults()
            arguments = {key: value for key, value in bound.arguments.items() if key != "self"}
            records.append((kind, arguments))
            nn.Module.__init__(self)
            for part in kinds[kind](arguments):
                _add_part(self, part)

        return record

    def refuse(self: MegatronModule, *args: Any, **kwargs: Any) -> None:
        raise _UnknownModel(type(self).__name__)

    known = ", ".join(kind.__name__ for kind in kinds)
    try:
        with rebound_construction({kind: recorder(kind, vars(kind)["__init__"]) for kind in kinds}, refuse):
            model = provider(pre_process=True, post_process=True)
    except _UnknownModel as error:
        raise unknown_model(str(error), known) from None
    except AttributeError as error:
        raise ConfigError(
            "model_provider",
            got=f"{error}",
            expected=f"a provider that builds one {known} and freezes whole parts of it",
            fix="write a ModelDefinition like megatron_mosaic/any2any",
        ) from error
    if len(records) != 1 or type(model) not in kinds:
        raise unknown_model(type(model).__name__, known)
    ((kind, arguments),) = records
    parts = kinds[kind](arguments)
    frozen = {part: not any(p.requires_grad for p in model.get_submodule(part).parameters()) for part in parts}
    return ModelRecord(kind=kind, arguments=arguments, frozen=frozen)


def _add_part(model: nn.Module, part: str) -> None:
    """Something in the place of a part, for the provider to freeze, in lists and mappings as upstream has them."""
    *path, last = part.split(".")
    for name, child in zip(path, [*path[1:], last]):
        if name not in dict(model.named_children()):
            model.add_module(name, nn.ModuleList() if child.isdigit() else nn.ModuleDict())
        model = model.get_submodule(name)
    model.add_module(last, nn.Linear(1, 1))


def unknown_model(name: str, known: str) -> ConfigError:
    """What a user is told of a script whose model has no adapter."""
    return ConfigError(
        "--mosaic-plan",
        got=f"a script whose model is a {name}, and a plan of several modules",
        expected=f"a model that an adapter knows: {known}",
        fix="plan for one module, or write the script like scripts/pretrain_any2any.py",
    )


class CallRecorder:
    """Stands in for a model: keeps the arguments of one call in `arguments`, and returns `outputs`."""

    def __init__(self, forward: Callable[..., Any], outputs: Any) -> None:
        """`forward`: of the model's class, unbound."""
        self._signature, self.outputs = inspect.signature(forward), outputs
        self.arguments: dict[str, Any] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        bound = self._signature.bind(None, *args, **kwargs)
        bound.apply_defaults()
        self.arguments = {key: value for key, value in bound.arguments.items() if key != "self"}
        return self.outputs


class LossFunction:
    """The `partial` that a script's forward_step returns, with a hole where the mask of the loss goes."""

    def __init__(self, found: Any, mask: Any) -> None:
        """`mask`: what stands in the hole. ConfigError unless nothing else of the batch is in the partial."""
        is_partial = isinstance(found, functools.partial)
        values = [*found.args, *found.keywords.values()] if is_partial else []
        if not is_partial or sum(value is mask for value in values) != 1:
            raise _not_a_sum(repr(found)[:200], "a functools.partial of a loss function and the mask of the loss")
        if any(isinstance(value, Tensor) and value is not mask for value in values):
            raise _not_a_sum("a partial that holds more of the batch than its mask", "partial(loss_func, loss_mask)")
        self._found, self._mask = found, mask

    def __call__(self, mask: Tensor, losses: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """(sum of the losses, loss tokens, what to log) over these samples. losses, mask [samples, tokens]."""
        args = [mask if value is self._mask else value for value in self._found.args]
        kwargs = {key: mask if value is self._mask else value for key, value in self._found.keywords.items()}
        result = self._found.func(*args, losses, **kwargs)
        if not isinstance(result, tuple) or len(result) != 3:
            raise _not_a_sum(f"{len(result)} values", "three: sum of the losses, loss tokens, what to log")
        return result

    def require_sums(self, mask: Tensor) -> None:
        """ConfigError unless the loss of some samples is the sum of theirs, as layout must not change it."""
        generator = torch.Generator().manual_seed(0)
        losses = torch.rand(mask.shape, generator=generator)
        whole = self._sums(mask, losses)
        parts = [self._sums(mask[i : i + 1], losses[i : i + 1]) for i in range(len(mask))]
        for name, together, one_by_one in zip(("loss", "number of loss tokens"), whole, zip(*parts, strict=True)):
            if abs(together - sum(one_by_one)) > 1e-4 * max(abs(together), 1e-30):
                raise _not_a_sum(
                    f"a {name} of {together:.6g} over {len(mask)} samples, and {sum(one_by_one):.6g} one by one",
                    "sums over samples: what is normalised per microbatch changes with the layout",
                )

    def _sums(self, mask: Tensor, losses: Tensor) -> tuple[float, float]:
        loss, num_tokens, _ = self(mask, losses)
        return float(loss), float(num_tokens)


def _not_a_sum(got: str, expected: str) -> ConfigError:
    return ConfigError(
        "forward_step: the loss function", got=got, expected=expected, fix="return sums, as pretrain_gpt.py does"
    )
