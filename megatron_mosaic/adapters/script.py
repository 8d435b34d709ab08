"""A Megatron pretrain script, unmodified, whose model a plan of several modules lays out.

    attach      rebinds Megatron's argument functions and `pretrain`; run_script then runs the script
    pretrain    record what model_provider builds -> adapter by its class -> Runtime -> Megatron's own pretrain()

All that can be refused is refused before a process group exists.
"""

from __future__ import annotations

import argparse
import runpy
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron.training.utils import print_rank_0

from megatron_mosaic.adapters.arguments import BACKBONE, SEEN_BY_SCRIPT, put_plan_into_arguments
from megatron_mosaic.adapters.batches.blocks import ScriptData
from megatron_mosaic.adapters.llava.definition import LLAVA
from megatron_mosaic.adapters.mimo.definition import MIMO
from megatron_mosaic.adapters.recording import ModelRecord, record_model, unknown_model
from megatron_mosaic.adapters.single_process import SingleProcess, world_of_one
from megatron_mosaic.parallel_state_ext.rebound.rebind import install_vision_norm, rebind_pretrain
from megatron_mosaic.plan import Plan
from megatron_mosaic.runtime.layers.norms import TorchNorm
from megatron_mosaic.runtime.train import MosaicModelConfig, Runtime

ADAPTERS = {adapter.kind: adapter for adapter in (LLAVA, MIMO)}

_DRAWN_BY_NAME = (
    "> mosaic: matrices are drawn by name, N(0, --init-method-std) from a stream of (seed, module, parameter), so that "
    "no layout changes them; the script's own draws (convolutions, class tokens, positions) are replaced, --load wins"
)


def run_script(script: str, arguments: Sequence[str], plan: Plan) -> None:
    """Run the script under the plan. MosaicError if script, arguments and plan do not fit."""
    attach(plan)
    run_main(script, arguments)


def attach(plan: Plan) -> None:
    """Let the next script of this process run under the plan."""
    install_vision_norm(TorchNorm)
    put_plan_into_arguments(plan)

    def pretrain(
        cfg_container: Any,
        train_valid_test_dataset_provider: Any,
        model_type: Any,
        forward_step_func: Any,
        model_provider: Any = None,
        **others: Any,
    ) -> None:
        if isinstance(cfg_container.model, MosaicModelConfig):  # the script brings a ModelDefinition of its own
            script_callbacks = (train_valid_test_dataset_provider, model_type, forward_step_func, model_provider)
            stock_pretrain(cfg_container, *script_callbacks, **others)
            return
        callbacks = (train_valid_test_dataset_provider, forward_step_func, model_provider)
        _pretrain(plan, stock_pretrain, cfg_container, model_type, *callbacks)

    stock_pretrain = rebind_pretrain(pretrain)


def run_main(script: str, arguments: Sequence[str]) -> None:
    """The script as `python SCRIPT ARGUMENTS` would run it."""
    sys.argv[:] = [script, *arguments]
    sys.path.insert(0, str(Path(script).resolve().parent))
    runpy.run_path(script, run_name="__main__")


def _pretrain(
    plan: Plan,
    stock_pretrain: Callable[..., Any],
    cfg_container: Any,
    model_type: Any,
    provider: Callable[..., Any],
    forward_step: Callable[..., Any],
    model_provider: Callable[..., Any] | None,
) -> None:
    from megatron.training import get_args

    args = get_args()
    record = record_script_model(args, cfg_container, model_provider)
    alone = SingleProcess(args, **getattr(args, SEEN_BY_SCRIPT))
    definition, reader = ADAPTERS[record.kind].build(record, plan, args, alone, forward_step)
    runtime = Runtime(args, plan, definition, reader.collate)
    print_rank_0(_DRAWN_BY_NAME)
    print_rank_0("> mosaic: every rank reads all samples of the script's data, so that the batch is the plan's")
    data = ScriptData.of(args, plan, BACKBONE, alone, provider)
    container = replace(cfg_container, model=MosaicModelConfig(_runtime=runtime))
    with runtime.finishing():
        stock_pretrain(container, data, model_type, reader.forward_step, **runtime.seams)


def record_script_model(
    args: argparse.Namespace, cfg_container: Any, model_provider: Callable[..., Any] | None
) -> ModelRecord:
    """What the script builds. ConfigError if no adapter knows it. No process group is there before or after."""
    if model_provider is None:
        name = type(cfg_container.model).__name__.removesuffix("Config") or "unknown"
        raise unknown_model(name, ", ".join(kind.__name__ for kind in ADAPTERS))
    with world_of_one(), SingleProcess(args, **getattr(args, SEEN_BY_SCRIPT, {}))():
        return record_model(model_provider, {kind: adapter.list_parts for kind, adapter in ADAPTERS.items()})
