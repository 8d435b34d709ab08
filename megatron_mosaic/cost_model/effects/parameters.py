"""Parameters of one pipeline stage on one rank: all, trained, and those whose optimizer step the rank computes."""

from __future__ import annotations

from megatron_mosaic.cost_model.effects.counts import (
    count_expert_parameters,
    count_parameters,
    count_projector_parameters,
)
from megatron_mosaic.cost_model.hardware.profile import Part
from megatron_mosaic.cost_model.work import StageWork
from megatron_mosaic.plan import Layout
from megatron_mosaic.plan.training import Sharding, TrainingSetup


def stage_parameters(work: StageWork) -> float:
    """Parameters of one stage on one rank. The last of several stages keeps its own copy of the embeddings where it
    makes logits with them, or reads the next token's (multi-token prediction)."""
    module, layout = work.module, work.layout
    tied = module.vocab_size and (not module.untied_output or module.num_mtp_layers)
    copy = module.vocab_size * module.hidden_size / layout.tp if tied and work.last and not work.first else 0.0
    ends = sum(work.parts()[part] * count_parameters(module, part, layout.tp) for part in (Part.pre, Part.post))
    return (
        copy
        + ends
        + sum(
            count * count_parameters(module, Part.layer, layout.tp, layout.ep * layout.etp, dense=dense)
            for dense, count in work.layers_by_mlp
        )
    )


def trained_parameters(work: StageWork) -> tuple[float, float]:
    """Those that are trained, dense and of routed experts: all, none, or the projector of a frozen module."""
    module = work.module
    if not module.frozen:
        experts = stage_expert_parameters(work)
        return stage_parameters(work) - experts, experts
    return count_projector_parameters(module) if module.trains_projector and work.last else 0.0, 0.0


def frozen_parameters(work: StageWork) -> float:
    """Those of `stage_parameters` that are not trained."""
    return stage_parameters(work) - sum(trained_parameters(work)) if work.module.frozen else 0.0


def stage_expert_parameters(work: StageWork) -> float:
    """Parameters of the routed experts of one stage on one rank."""
    return work.expert_layers * count_expert_parameters(work.module, work.layout.ep, work.layout.etp)


def shards_of(layout: Layout, setup: TrainingSetup) -> tuple[int, int]:
    """Ranks over which the optimizer of dense and of expert parameters is sharded."""
    dense = layout.dp * layout.cp
    share = setup.optimizer_shards / dense if setup.optimizer_shards else 1.0
    experts = max(1, dense * layout.tp // (layout.ep * layout.etp))
    return max(1, round(dense * min(1.0, share))), max(1, round(experts * min(1.0, share)))


def updated_parameters(work: StageWork, setup: TrainingSetup) -> float:
    """Parameters whose optimizer step a rank computes: its shard where the optimizer is sharded."""
    shards = (1, 1) if setup.sharding is Sharding.none else shards_of(work.layout, setup)
    dense, experts = (count / ranks for count, ranks in zip(trained_parameters(work), shards))
    return dense + experts
