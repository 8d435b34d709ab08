"""The parameters of a script's model under the names of the undivided model, and their values drawn by name.

Megatron draws other numbers in every layout; here each whole matrix comes from a stream of its own name, on both sides
of a check.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import MegatronModule, TransformerConfig
from megatron.core.utils import unwrap_model
from torch import nn

from megatron_mosaic.adapters.script import ADAPTERS
from megatron_mosaic.plan import Plan
from megatron_mosaic.runtime.model import draw_by_name
from megatron_mosaic.runtime.parameters import Cut, cut_of, whole_name

_EMBEDDING, _OUTPUT = "embedding.word_embeddings.weight", "output_layer.weight"


@dataclass(frozen=True, slots=True, kw_only=True)
class Named:
    """A parameter: `whole` is `module/parameter` of the undivided model, `own` its name in `model`, `cut` which slice
    of the whole it is, `config` decides how wide it is drawn."""

    whole: str
    own: str
    model: MegatronModule
    config: TransformerConfig
    parameter: nn.Parameter
    cut: Cut | None = None


NameParameters = Callable[[Sequence[Any]], Iterator[Named]]


def naming(plan: Plan) -> NameParameters:
    """How the parameters of the chunks of a model are called under this plan."""
    if len(plan.modules) > 1:
        return of_adapter
    (module,) = plan.modules
    return lambda chunks: _of_one_module(module, chunks)


def of_adapter(chunks: Sequence[Any]) -> Iterator[Named]:
    """Of whole modules of a model that an adapter knows."""
    for model in unwrap_model(list(chunks)):
        adapter = ADAPTERS[type(model)]
        for name, parameter in model.named_parameters():
            module = adapter.module_of(name)
            config = adapter.config_of(model, module)
            whole = f"{module}/model.{name}"
            yield Named(whole=whole, own=name, model=model, config=config, parameter=parameter)


def _of_one_module(module: str, chunks: Sequence[Any]) -> Iterator[Named]:
    model: MegatronModule
    for model in unwrap_model(list(chunks)):
        if getattr(model, "pg_collection", None) is None:
            model.pg_collection = ProcessGroupCollection.use_mpu_process_groups()
        for own, parameter in model.named_parameters():
            tied = own == _OUTPUT and model.share_embeddings_and_output_weights  # the last stage's copy
            whole = f"{module}/{_EMBEDDING if tied else whole_name(model, own)}"
            cut = cut_of(model, own, parameter)
            yield Named(whole=whole, own=own, model=model, config=model.config, parameter=parameter, cut=cut)


@torch.no_grad()
def draw(parameters: Iterator[Named], seed: int) -> None:
    """Matrices as `runtime.model.initialize_by_name` draws them; biases are 0, norms stay as they were built."""
    for each in parameters:
        if each.parameter.dim() < 2:
            if each.own.endswith("bias"):
                each.parameter.zero_()
            continue
        shape = each.cut.whole_shape(each.parameter.shape) if each.cut else each.parameter.shape
        whole = draw_by_name(each.whole, shape, each.config, seed)
        each.parameter.copy_(each.cut.of(whole) if each.cut else whole)
