"""What a multimodal model brings to the runtime: its workload, its stages, and how a batch falls into items and rows.

A *stage* is the part of one module that one pipeline stage runs. An *item* is what a module is data-parallel over:
a sample for the backbone, an image for an image encoder or generator. Rows (tokens) cross module borders along links.

    vision stage --exports["llm"]--> llm stage 0 --hidden--> llm stage 1 --exports["generator"]--> generator stage

The runtime says which items and which of their tokens a rank holds (`Shard`), and where the rows of an edge stand in
its hidden states (`Place`); a stage never computes with ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import MegatronModule
from torch import Tensor

from megatron_mosaic.parallel_state_ext.boundaries.channels.row_channel import Place
from megatron_mosaic.parallel_state_ext.boundaries.items import Items, Links, Shard
from megatron_mosaic.plan import ModulePlan
from megatron_mosaic.plan.workload import Edge, Workload

Batch = Mapping[str, Tensor]  # consecutive samples, identical on every rank, on the CPU


@dataclass(frozen=True, slots=True, kw_only=True)
class StageInputs:
    """What one forward of a stage gets. Hidden states are [len(shard.tokens), len(shard.items), hidden_size].

    `tensors`     `select_inputs` of this rank's shard, on the device
    `hidden`      from the module's stage before; None on stage 0
    `imports`     producer module -> rows [rows, width] for this shard; on stage 0 only; gradients flow back
    `imports_at`  producer module -> where each of these rows goes in the hidden states
    `exports_at`  consumer module -> where the rows it reads stand; on the last stage only

    Every producer and consumer is there, also with 0 rows, to be used all the same: ranks that share an item (cp,
    sequence parallelism, experts) then meet in backward, whoever's tokens are read.
    """

    shard: Shard
    tensors: Mapping[str, Tensor]
    hidden: Tensor | None = None
    imports: Mapping[str, Tensor] = field(default_factory=dict)
    imports_at: Mapping[str, Place] = field(default_factory=dict)
    exports_at: Mapping[str, Place] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class StageOutput:
    """What one forward of a stage returns.

    `hidden`  hidden states for the module's next stage; None on the last stage
    `exports` consumer module -> the rows of `exports_at`, [rows, width]; for every key of `exports_at`
    `loss`    scalar: the sum (not the mean) over this rank's loss tokens, already weighted; None without a loss
    `num_tokens` how much `loss` sums over; the global sum of it is the one divisor of all gradients. A tensor where it
              is on a GPU: the host need not wait for the number
    `report`  loss name -> tensor([sum, count]), for logging
    `loss`, `num_tokens` and `report` are the same on all tp ranks, and count only the tokens of this cp rank.
    """

    hidden: Tensor | None = None
    exports: Mapping[str, Tensor] = field(default_factory=dict)
    loss: Tensor | None = None
    num_tokens: float | Tensor = 0
    report: Mapping[str, Tensor] = field(default_factory=dict)


class Stage(Protocol):
    """A MegatronModule whose forward is this. Never called with zero items."""

    def forward(self, inputs: StageInputs) -> StageOutput: ...


class ModelDefinition(Protocol):
    """A model the runtime can lay out under any plan."""

    @property
    def workload(self) -> Workload: ...

    @property
    def loss_names(self) -> tuple[str, ...]:
        """Every key that a `report` may have, the same on all ranks."""

    def build_stage(
        self, module: str, placed: ModulePlan, stage: int, pg_collection: ProcessGroupCollection, chunk: int = 0
    ) -> MegatronModule:
        """Virtual stage `chunk` of pipeline stage `stage`, in its module's groups. Parameters may be left as they
        come: the runtime initialises them by name. `requires_grad` is False on what the workload freezes. Under
        sequence parallelism, parameters that see only a tp rank's tokens carry `sequence_parallel = True`."""

    def list_items(self, batch: Batch) -> Mapping[str, Items]:
        """Module -> its items. The backbone has one per sample."""

    def list_links(self, edge: Edge, batch: Batch) -> Links:
        """What flows along the edge, item numbers as in `list_items`."""

    def select_inputs(self, module: str, batch: Batch, shard: Shard) -> dict[str, Tensor]:
        """Tensors that the module's stages need for these items of the batch and for `shard.cp_tokens`."""
