"""Batches and losses of a script: what its forward_step gives to the model, and the loss function that it returns."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from megatron_mosaic.adapters.batches.tokens import ItemRows, join_blocks
from megatron_mosaic.adapters.recording import CallRecorder, LossFunction
from megatron_mosaic.adapters.single_process import SingleProcess
from megatron_mosaic.adapters.stages import LOSS_MASK
from megatron_mosaic.definition import Batch, StageOutput
from megatron_mosaic.errors import ConfigError

Place = Callable[[Mapping[str, Any]], dict[str, Tensor]]  # arguments of a model's call -> a block as in `tokens`


class ScriptReader:
    """The script's forward_step on every block. `_loss_function`: of the last one; the mask apart, all are the same.

    The model returns its losses and the mask, as LLaVAModel and MimoModel do.
    """

    def __init__(
        self,
        alone: SingleProcess,
        forward_step: Callable[..., Any],
        forward: Callable[..., Any],
        place: Place,
        kinds: Sequence[ItemRows],
    ) -> None:
        """`forward`: of the model's class, unbound."""
        self._alone, self._script_step, self._forward = alone, forward_step, forward
        self._place, self._kinds = place, kinds
        self._loss_function: LossFunction | None = None

    def collate(self, blocks: Sequence[Any]) -> Batch:
        """One batch, as in `tokens`."""
        return join_blocks([self._read(block) for block in blocks], self._kinds)

    def forward_step(self, calls: Iterator[Any], model: Any) -> tuple[StageOutput, Callable[[StageOutput], Any]]:
        """One stage of one module on one unit."""
        return model(next(calls)), self._sum_losses

    def _sum_losses(self, output: StageOutput) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        assert self._loss_function is not None and output.loss is not None
        with self._alone():
            loss, num_tokens, report = self._loss_function(output.report[LOSS_MASK], output.loss)
        return loss, num_tokens, {"lm loss": report["lm loss"]}

    def _read(self, block: Any) -> dict[str, Tensor]:
        """One block, numbered by itself."""
        mask = object()
        recorder = CallRecorder(self._forward, (object(), mask))
        with self._alone():
            _, partial = self._script_step(iter([block]), recorder)
        part = self._place(recorder.arguments)
        is_first, self._loss_function = self._loss_function is None, LossFunction(partial, mask)
        if is_first:
            with self._alone():
                self._loss_function.require_sums(part[LOSS_MASK])
        return part


def on_host(value: Any) -> Any:
    """The value, on the CPU if it is a tensor."""
    return value.cpu() if isinstance(value, Tensor) else value


def not_exact(key: str, got: object) -> ConfigError:
    """For an argument of a model's call that the stages would ignore."""
    return ConfigError(
        f"forward_step: model({key}=...)",
        got=got,
        expected="a batch of text and images with labels: nothing else is laid out exactly yet",
        fix="leave the option out that makes it",
    )
