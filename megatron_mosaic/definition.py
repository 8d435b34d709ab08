"""What a multimodal model brings to the runtime: its workload, its stages, and how a batch falls into items.

A *stage* is the part of one module that one pipeline stage runs. An *item* is what a module is data-parallel over:
a sample for the backbone, an image for an image encoder or generator. Rows cross module borders, `[rows, width]`.

    vision stage --exports["llm"]--> llm stage 0 --hidden--> llm stage 1 --exports["generator"]--> generator stage
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import MegatronModule
from torch import Tensor

from megatron_mosaic.plan import Layout
from megatron_mosaic.workload import Workload

Batch = Mapping[str, Tensor]  # one global microbatch, identical on every rank, on the CPU


@dataclass(frozen=True, slots=True, kw_only=True)
class StageOutput:
    """What one forward of a stage returns.

    `hidden`  [tokens_per_item, items, hidden_size] for the module's next stage; None on the last stage
    `exports` rows for each consumer module, [items * rows_per_item, width], item by item; on the last stage only
    `loss`    scalar: the sum (not the mean) over this lane's loss tokens, already weighted; None without a loss
    `num_tokens` how many tokens `loss` sums over; the global sum of it is the one divisor of all gradients
    `report`  loss name -> tensor([sum, count]), for logging
    Every value is replicated over the module's tp ranks.
    """

    hidden: Tensor | None = None
    exports: Mapping[str, Tensor] = field(default_factory=dict)
    loss: Tensor | None = None
    num_tokens: int = 0
    report: Mapping[str, Tensor] = field(default_factory=dict)


class Stage(Protocol):
    """A MegatronModule whose forward is this. Never called with zero items."""

    def forward(
        self, inputs: Mapping[str, Tensor], hidden: Tensor | None, imports: Mapping[str, Tensor]
    ) -> StageOutput:
        """`inputs`: `select_inputs` of this lane's items. `hidden`: from the previous stage, None on stage 0.
        `imports`: producer module -> rows for this lane's items (stage 0 only), gradients flow back through them."""


class ModelDefinition(Protocol):
    """A model the runtime can lay out under any plan."""

    @property
    def workload(self) -> Workload: ...

    @property
    def loss_names(self) -> tuple[str, ...]:
        """Every key that a `report` may have, the same on all ranks."""

    def build_stage(
        self, module: str, layout: Layout, stage: int, pg_collection: ProcessGroupCollection
    ) -> MegatronModule:
        """Stage `stage` of `layout.pp`, in its module's groups. Parameters may be left as they come: the runtime
        initialises them by name."""

    def count_items(self, batch: Batch) -> Mapping[str, Sequence[int]]:
        """Module -> number of items of each sample of the batch (all ones for the backbone). Item i of a module is
        the i-th in sample order."""

    def select_inputs(self, module: str, batch: Batch, items: Sequence[int]) -> dict[str, Tensor]:
        """Tensors that the module needs for these items of the batch, in this order."""
