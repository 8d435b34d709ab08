"""MosaicModel: all stages of one rank behind the face that Megatron's training loop expects of `model[0]`."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject
from megatron.core.dist_checkpointing.utils import replace_prefix_for_sharding
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import MegatronModule, TransformerConfig
from torch import nn

from megatron_mosaic.definition import StageInputs, StageOutput
from megatron_mosaic.parallel_state_ext.optimizers.gradient_sums import JoinedBuckets, join_buckets
from megatron_mosaic.parallel_state_ext.rng_states import PROCESS, RngStates
from megatron_mosaic.runtime.parameters import cut_of, whole_name

_SCALED = ("linear_proj.weight", "linear_fc2.weight")  # outputs of residual branches


@dataclass(frozen=True, slots=True)
class StageCall:
    """One forward of one (virtual) stage."""

    module: str
    chunk: int
    inputs: StageInputs


def stage_key(module: str, chunk: int) -> str:
    """Under which name MosaicModel keeps a virtual stage."""
    return f"{module}-v{chunk}" if chunk else module


def module_of(key: str) -> str:
    """The module of a stage's key."""
    return key.partition("-v")[0]


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
        rng_states: RngStates,
    ) -> None:
        """`rng_states`: RNG streams that are saved and restored with the model."""
        super().__init__(config)
        self.stages = nn.ModuleDict(stages)
        self.ddp_config = ddp_config
        self.pg_collection = world_view
        self.rng_states = rng_states
        self._joined: dict[tuple[str, ...], list[JoinedBuckets]] = {}  # by the modules that are summed together

    def forward(self, call: StageCall) -> StageOutput:
        return self.stages[stage_key(call.module, call.chunk)](call.inputs)

    def stages_of(self, module: str) -> list[DistributedDataParallel]:
        """The module's (virtual) stages on this rank, in order."""
        return [stage for key, stage in self.stages.items() if module_of(key) == module]

    def zero_grad_buffer(self) -> None:
        for stage in self.stages.values():
            stage.zero_grad_buffer()

    def scale_gradients(self, factor: float) -> None:
        for stage in self.stages.values():
            stage.scale_gradients(factor)

    def start_sync(self, modules: Iterable[str]) -> None:
        """Begin to sum these modules' gradients over their data-parallel ranks."""
        together = tuple(modules)
        if together not in self._joined:
            self._joined[together] = join_buckets(stage for name in together for stage in self.stages_of(name))
        for buckets in self._joined[together]:
            buckets.start()

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
        for key, wrapped in self.stages.items():
            stage, module = wrapped.module, module_of(key)
            groups = stage.pg_collection
            own = dict(metadata or {}) | {"dp_cp_group": groups.dp_cp}
            part = stage.sharded_state_dict(f"{prefix}{key}.", sharded_offsets, own)
            replace_prefix_for_sharding(part, f"{prefix}{key}.", f"{prefix}{module}.")  # layers know their number
            state |= part
            if key == module:
                state |= self.rng_states.sharded(module, groups)
        return state | self.rng_states.sharded_process()

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> None:  # type: ignore[override]
        """Always strict: Megatron's loader tries again without, and would go on with parameters that stayed behind."""
        for name, wrapped in self.stages.items():
            own = {k.removeprefix(f"{name}."): v for k, v in state_dict.items() if k.startswith(f"{name}.")}
            streams = own.pop("rng", None)
            if streams is not None:
                self.rng_states.restore(name, streams)
            wrapped.module.load_state_dict(own, strict=True)
        if PROCESS in state_dict:
            self.rng_states.restore_process(state_dict[PROCESS])


def wrap_stage(
    stage: MegatronModule, ddp_config: DistributedDataParallelConfig, groups: ProcessGroupCollection
) -> DistributedDataParallel:
    """The stage with its gradient buffers, whose buckets reduce asynchronously whenever the step starts them.

    The config is copied: DistributedDataParallel writes a bucket size for its own number of ranks into it, and ranks
    of one module would cut their buffers differently where they run different modules besides.
    """
    own = replace(ddp_config, overlap_grad_reduce=True)
    return DistributedDataParallel(stage.config, own, stage, pg_collection=groups)


def empty_stage(
    config: TransformerConfig, ddp_config: DistributedDataParallelConfig, groups: ProcessGroupCollection
) -> DistributedDataParallel:
    """A stage without parameters: stands in where Megatron wants every rank to take part."""
    stage = MegatronModule(config)
    stage.pg_collection = groups
    return DistributedDataParallel(config, ddp_config, stage, pg_collection=groups)


@torch.no_grad()
def initialize_by_name(stage: MegatronModule, module: str, seed: int) -> None:
    """Draw every matrix of the stage from a stream named after (seed, module, parameter).

    So the weights do not depend on the layout: each rank draws the whole matrix and keeps its slice. Biases are 0;
    other vectors (norms) keep the constants they were built with. Standard deviations follow Megatron:
    `init_method_std`, divided by sqrt(2 * num_layers) at the outputs of residual branches.
    """
    for name, parameter in stage.named_parameters():
        if parameter.dim() < 2:
            if name.endswith("bias"):
                parameter.zero_()
            continue
        cut = cut_of(stage, name, parameter)
        shape = cut.whole_shape(parameter.shape) if cut else parameter.shape
        whole = draw_by_name(f"{module}/{whole_name(stage, name)}", shape, stage.config, seed)
        parameter.copy_((cut.of(whole) if cut else whole).to(parameter))


def draw_by_name(name: str, shape: Sequence[int], config: TransformerConfig, seed: int) -> torch.Tensor:
    """A whole matrix; `name`: `module/parameter` of the whole module."""
    std = config.init_method_std
    if name.endswith(_SCALED):
        std /= (2 * config.num_layers) ** 0.5
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    return torch.randn(tuple(shape), generator=generator) * std
