"""Bugs in what gradients are summed over and divided by."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from megatron.core.distributed import finalize_model_grads

from megatron_mosaic.any2any import pretrain
from megatron_mosaic.parallel_state_ext.optimizers.gradient_sums import JoinedBuckets
from megatron_mosaic.parallel_state_ext.rebound.grad_handles import give_handle
from megatron_mosaic.runtime import model
from megatron_mosaic.runtime.lane_runner import LaneRunner
from megatron_mosaic.runtime.loss_sums import LossSums
from megatron_mosaic.runtime.model import MosaicModel
from tests.faults.bugs.catalogue import Patch, bug


def scaled(patch: Patch, factors: Callable[[str, str], float]) -> None:
    """Finished gradients times a factor of (module, parameter)."""
    scale_gradients = MosaicModel.scale_gradients

    def scale(self: MosaicModel, factor: float) -> None:
        scale_gradients(self, factor)
        for key, stage in self.stages.items():
            for name, parameter in stage.named_parameters():
                if parameter.requires_grad:
                    parameter.main_grad.mul_(factors(model.module_of(key), name))

    patch.setattr(MosaicModel, "scale_gradients", scale)


@bug("gradients of one module halved")
def _(patch: Patch) -> None:
    scaled(patch, lambda module, name: 0.5 if module == "vision" else 1.0)


@bug("gradients of one module 3e-5 too large")
def _(patch: Patch) -> None:
    scaled(patch, lambda module, name: 1 + 3e-5 if module == "llm" else 1.0)


@bug("gradient of one bias 0.1 % too large")
def _(patch: Patch) -> None:
    scaled(patch, lambda module, name: 1.001 if name.endswith("final_layernorm.bias") else 1.0)


@bug("gradient of the routers 1 % too large", "experts")
def _(patch: Patch) -> None:
    scaled(patch, lambda module, name: 1.01 if "router" in name else 1.0)


@bug("gradients of experts doubled", "experts")
def _(patch: Patch) -> None:
    scaled(patch, lambda module, name: 2.0 if "experts" in name else 1.0)


@bug("gradients of layer norms not summed over tp ranks that split the tokens")
def _(patch: Patch) -> None:
    beside = finalize_model_grads.__globals__  # the function hides its module
    patch.setitem(beside, "_allreduce_non_tensor_model_parallel_grads", lambda *args, **kwargs: None)


@bug("gradients not summed over data-parallel ranks")
def _(patch: Patch) -> None:
    patch.setattr(JoinedBuckets, "start", _without_sum)


@bug("no reduce-scatter", "sharded optimizer")
def _(patch: Patch) -> None:
    patch.setattr(JoinedBuckets, "start", _without_sum)


def _without_sum(self: JoinedBuckets) -> None:
    for member in self._members:
        give_handle(member, SimpleNamespace(wait=lambda: None))


@bug("gradients of the step before not cleared")
def _(patch: Patch) -> None:
    patch.setattr(MosaicModel, "zero_grad_buffer", lambda self: None)


@bug("one lost token in the divisor")
def _(patch: Patch) -> None:
    patch.setattr(LossSums, "divisor", lambda self, totals: float(totals[0]) - 1)


@bug("loss of the generator 0.1 % too heavy")
def _(patch: Patch) -> None:
    sound = pretrain.loss_func

    def heavier(output: Any) -> Any:
        loss, count, report = sound(output)
        return loss * 1.001 if "generator loss" in report else loss, count, report

    patch.setattr(pretrain, "loss_func", heavier)


def _lost(patch: Patch, is_lost: Callable[[Any], bool]) -> None:
    account = LaneRunner._account_loss

    def without(self: LaneRunner, action: Any, output: Any, loss_function: Any) -> Any:
        loss = account(self, action, output, loss_function)
        return loss * 0.0 if loss is not None and is_lost(action) else loss

    patch.setattr(LaneRunner, "_account_loss", without)


@bug("last microbatch lost")
def _(patch: Patch) -> None:
    _lost(patch, lambda action: action.unit == 1)


@bug("last microbatch lost", "pipelines")
def _(patch: Patch) -> None:
    _lost(patch, lambda action: action.unit == 3)
