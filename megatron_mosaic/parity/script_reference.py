"""A Megatron script on one process without a plan: the oracle of `mosaic check --script`.

Megatron's own model, data loader, schedule, gradient buffers and optimizer do the work; of ours are what a CPU needs,
the batch of the plan, and the weights, which are drawn by name as under the plan.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.transformer import MegatronModule
from torch import nn

from megatron_mosaic.adapters.adapter import Adapter
from megatron_mosaic.adapters.arguments import script_defaults
from megatron_mosaic.adapters.script import ADAPTERS, run_main
from megatron_mosaic.parallel_state_ext.rebound.rebind import (
    install_vision_norm,
    rebind_arguments,
    rebind_pretrain,
    watch_steps,
)
from megatron_mosaic.parity.reference_files import ReferenceStep, save_parameters
from megatron_mosaic.plan import Plan
from megatron_mosaic.runtime.layers.norms import TorchNorm
from megatron_mosaic.runtime.model import draw_by_name


def main(script: str, words: Sequence[str], plan: Plan, directory: str) -> int:
    """Run the script on this process, and write a ReferenceStep per step and the parameters at the end."""
    install_vision_norm(TorchNorm)
    _put_batch_into_arguments(plan)
    run = _Run(Path(directory))

    def pretrain(
        cfg_container: Any,
        train_valid_test_dataset_provider: Any,
        model_type: Any,
        forward_step_func: Any,
        model_provider: Any = None,
        **others: Any,
    ) -> None:
        def provide(*args: Any, **kwargs: Any) -> Any:
            return run.take(model_provider(*args, **kwargs))

        stock(cfg_container, train_valid_test_dataset_provider, model_type, forward_step_func, provide, **others)
        run.finish()

    stock = rebind_pretrain(pretrain)
    watch_steps(run.before_step, run.after_step)
    run_main(script, words)
    return 0


def _put_batch_into_arguments(plan: Plan) -> None:
    def add(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        parser = stock_add(parser)
        # Format torch: pretrain_vlm.py asserts it, and nothing is saved here
        parser.set_defaults(**{**script_defaults(), "ckpt_format": "torch"})
        return parser

    def validate(args: argparse.Namespace, defaults: Any = None) -> Any:
        args.micro_batch_size, args.global_batch_size = plan.micro_batch_size, plan.global_batch_size
        args.calculate_per_token_loss = True
        return stock_validate(args, defaults or {})

    stock_add, stock_validate = rebind_arguments(add=add, validate=validate)


class _Run:
    """One run of the script: counts in `_step`, and keeps the `_models` that it builds and the last `_gradients`."""

    def __init__(self, directory: Path) -> None:
        self._directory, self._step = directory, 0
        self._models: list[tuple[Adapter, MegatronModule]] = []
        self._gradients: dict[str, np.ndarray] = {}

    @torch.no_grad()
    def take(self, model: Any) -> Any:
        """The model, with its weights drawn by name."""
        from megatron.training import get_args

        adapter = ADAPTERS[type(model)]
        for module, name, parameter in _parameters(adapter, model):
            if parameter.dim() < 2:
                if name.endswith("bias"):
                    parameter.zero_()
                continue
            config = getattr(model, adapter.config_of[module]).config
            parameter.copy_(draw_by_name(f"{module}/{name}", parameter.shape, config, get_args().seed))
        self._models.append((adapter, model))
        return model

    def before_step(self) -> None:
        """Keep the gradients that the optimizer is about to use."""
        self._gradients = {
            f"{module}/{name}": parameter.main_grad.float().numpy().copy()  # type: ignore[attr-defined]
            for adapter, model in self._models
            for module, name, parameter in _parameters(adapter, model)
            if parameter.requires_grad
        }

    def after_step(self, losses: dict[str, Any]) -> None:
        """Write the step down."""
        found = {name: float(value) for name, value in losses.items()}
        step = ReferenceStep(losses=found, gradients=self._gradients, rounding={}, unrepeatable={})
        step.save(self._directory, self._step)
        self._step += 1

    def finish(self) -> None:
        """Write the parameters down."""
        values = {
            f"{module}/{name}": parameter.detach().float().numpy().copy()
            for adapter, model in self._models
            for module, name, parameter in _parameters(adapter, model)
        }
        save_parameters(self._directory, values)


def _parameters(adapter: Adapter, model: MegatronModule) -> list[tuple[str, str, nn.Parameter]]:
    """(module, name in its stages, parameter) of every parameter of the whole model."""
    return [(adapter.module_of(name), f"model.{name}", p) for name, p in model.named_parameters()]
