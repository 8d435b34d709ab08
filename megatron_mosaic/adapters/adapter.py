"""What an adapter is: a class of models, and how one of them becomes a ModelDefinition with its batches."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from megatron.core.transformer import MegatronModule, TransformerConfig

from megatron_mosaic.adapters.recording import ModelRecord
from megatron_mosaic.adapters.single_process import SingleProcess
from megatron_mosaic.definition import Batch, ModelDefinition, StageOutput
from megatron_mosaic.plan import Plan
from megatron_mosaic.runtime.lane_runner import LossFunction


class Reader(Protocol):
    """A script's batches and losses."""

    def collate(self, blocks: Sequence[Any]) -> Batch:
        """The batch of these blocks, what the script's forward_step makes of each."""

    def forward_step(self, calls: Iterator[Any], model: Any) -> tuple[StageOutput, LossFunction]:
        """One stage on one unit, and the script's loss function."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """`kind`: the class. `tops`: its parts. `list_parts`: of its constructor's arguments, the parts that a provider may
    freeze, as dotted names. `module_of`: parameter's name in the whole model -> the module that has it, whose stages
    have it as `model.NAME`. `config_of`: (whole model, module) -> the config of that module's layers."""

    kind: type
    tops: tuple[str, ...]
    list_parts: Callable[[Mapping[str, Any]], Sequence[str]]
    build: Callable[
        [ModelRecord, Plan, argparse.Namespace, SingleProcess, Callable[..., Any]], tuple[ModelDefinition, Reader]
    ]
    module_of: Callable[[str], str]
    config_of: Callable[[MegatronModule, str], TransformerConfig]
