"""MosaicModel: all stages of one rank behind the face that Megatron's training loop expects of `model[0]`."""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import MegatronModule, TransformerConfig
from torch import Tensor, nn

from megatron_mosaic.definition import StageOutput
from megatron_mosaic.parallel_state_ext.streams import Streams
from megatron_mosaic.plan import Recompute

_SCALED = ("linear_proj.weight", "linear_fc2.weight")  # outputs of residual branches
_LAYER = re.compile(r"^(.*\blayers)\.(\d+)\.(.*)$")


@dataclass(frozen=True, slots=True)
class StageCall:
    """The arguments of one stage's forward: see definition.Stage."""

    module: str
    inputs: Mapping[str, Tensor]
    hidden: Tensor | None
    imports: Mapping[str, Tensor]


class MosaicModel(MegatronModule):
    """The stages this rank runs, each wrapped in its own DistributedDataParallel. May be empty (an idle rank).

    `model(call)` runs one stage. Everything else is the loop's: gradient buffers, switches, checkpoints.
    `pg_collection` is the *world view* (see Grids.world_view); modules use their own collections.
    """

    def __init__(
        self,
        config: TransformerConfig,
        stages: Mapping[str, DistributedDataParallel],
        ddp_config: DistributedDataParallelConfig,
        world_view: ProcessGroupCollection,
    ) -> None:
        super().__init__(config)
        self.stages = nn.ModuleDict(stages)
        self.ddp_config = ddp_config
        self.pg_collection = world_view
        self.model_type: Any = None
        self.force_all_reduce = False
        self.streams: Streams | None = None  # RNG streams to be saved and restored with the model

    def forward(self, call: StageCall) -> StageOutput:
        return self.stages[call.module](call.inputs, call.hidden, call.imports)

    def set_input_tensor(self, input_tensor: object) -> None:
        """Part of the loop's protocol; stages get their inputs as arguments."""
        assert input_tensor is None, "MosaicModel takes inputs through StageCall"

    def zero_grad_buffer(self) -> None:
        for stage in self.stages.values():
            stage.zero_grad_buffer()

    def scale_gradients(self, factor: float) -> None:
        for stage in self.stages.values():
            stage.scale_gradients(factor)

    def start_grad_sync(self, *args: Any) -> None:
        for stage in self.stages.values():
            stage.start_grad_sync(*args)

    def finish_grad_sync(self, force_all_reduce: bool | None = False) -> None:
        for stage in self.stages.values():
            stage.finish_grad_sync(force_all_reduce=force_all_reduce)

    def start_param_sync(self, *args: Any, **kwargs: Any) -> None:
        for stage in self.stages.values():
            stage.start_param_sync(*args, **kwargs)

    def enable_forward_pre_hook(self) -> None:
        for stage in self.stages.values():
            stage.enable_forward_pre_hook()

    def disable_forward_pre_hook(self, param_sync: bool = True) -> None:
        for stage in self.stages.values():
            stage.disable_forward_pre_hook(param_sync=param_sync)

    def free_overlap_buffers(self) -> None:
        for stage in self.stages.values():
            stage.free_overlap_buffers()

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for stage in self.stages.values():
                stack.enter_context(stage.no_sync())
            yield

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Every stage under its module's name, with its module's own groups deciding who writes what."""
        # The entry that is never saved keeps an idle rank's model in the loaded state: Megatron drops what is empty.
        state: dict[str, Any] = {"~here": LocalNonpersistentObject(list(self.stages))}
        for name, wrapped in self.stages.items():
            stage = wrapped.module
            groups = stage.pg_collection
            own = dict(metadata or {}) | {"dp_cp_group": groups.dp_cp}
            state |= stage.sharded_state_dict(f"{prefix}{name}.", sharded_offsets, own)
            if self.streams is not None:
                state |= self.streams.sharded(name, groups)
        if self.streams is not None:
            state |= self.streams.sharded_process()
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> None:  # type: ignore[override]
        """Always strict: Megatron's loader tries again without, and would go on with parameters that stayed behind."""
        for name, wrapped in self.stages.items():
            own = {k.removeprefix(f"{name}."): v for k, v in state_dict.items() if k.startswith(f"{name}.")}
            streams = own.pop("rng", None)
            if streams is not None and self.streams is not None:
                self.streams.restore(name, streams)
            wrapped.module.load_state_dict(own, strict=True)
        if self.streams is not None and "~rng" in state_dict:
            self.streams.restore_process(state_dict["~rng"])


def empty_stage(
    config: TransformerConfig, ddp_config: DistributedDataParallelConfig, groups: ProcessGroupCollection
) -> DistributedDataParallel:
    """A stage without parameters: stands in where Megatron wants every rank to take part."""
    stage = MegatronModule(config)
    stage.pg_collection = groups
    return DistributedDataParallel(config, ddp_config, stage, pg_collection=groups)


def apply_recompute(config: TransformerConfig, recompute: Recompute) -> None:
    """Make a stage's layers compute their activations again in backward, as its plan says."""
    if recompute is Recompute.full:
        config.recompute_granularity = "full"
        config.recompute_method = "uniform"
        config.recompute_num_layers = 1


def undivided_name(stage: nn.Module, parameter: str) -> str:
    """The parameter's name in the module that is not cut into pipeline stages.

    Layers of a stage count from 0; a transformer layer knows its number in the whole module (`layer_number`, from 1).
    """
    match = _LAYER.match(parameter)
    if match is None:
        return parameter
    layer = stage.get_submodule(f"{match[1]}.{match[2]}")
    number = getattr(layer, "layer_number", None)
    return parameter if number is None else f"{match[1]}.{number - 1}.{match[3]}"


@torch.no_grad()
def initialize_by_name(stage: MegatronModule, module: str, seed: int) -> None:
    """Draw every matrix of the stage from a stream named after (seed, module, parameter).

    So the weights do not depend on the layout: each rank draws the whole matrix and keeps its shard. Biases are 0;
    other vectors (norms) keep the constants they were built with. Standard deviations follow Megatron:
    `init_method_std`, divided by sqrt(2 * num_layers) at the outputs of residual branches.
    """
    config = stage.config
    shards = stage.pg_collection.tp
    for name, parameter in stage.named_parameters():
        if parameter.dim() < 2:
            if name.endswith("bias"):
                parameter.zero_()
            continue
        std = config.init_method_std
        if name.endswith(_SCALED):
            std /= (2 * config.num_layers) ** 0.5
        dim = parameter.partition_dim if getattr(parameter, "tensor_model_parallel", False) else None
        shape = list(parameter.shape)
        if dim is not None:
            shape[dim] *= shards.size()
        digest = hashlib.sha256(f"{seed}/{module}/{undivided_name(stage, name)}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        whole = torch.randn(shape, generator=generator) * std
        part = whole if dim is None else whole.chunk(shards.size(), dim)[shards.rank()]
        parameter.copy_(part.to(parameter))
