"""One process as its own gloo world, Megatron's arguments for the default model, and helpers to run it there."""

import sys
from dataclasses import fields, replace
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.training.arguments import parse_args, validate_args

from megatron_mosaic.any2any.arguments import MEGATRON_DEFAULTS, add_any2any_arguments, workload_from_args
from megatron_mosaic.any2any.definition import Any2Any
from megatron_mosaic.definition import StageInputs
from megatron_mosaic.parallel_state_ext.boundaries.items import rows_of, shard_of
from megatron_mosaic.parallel_state_ext.rebound import cpu
from megatron_mosaic.parity.reference import ALONE
from megatron_mosaic.plan import Layout, ModulePlan, RankSet


@pytest.fixture(scope="module")
def one_rank():
    """A world of one rank; Megatron's own parallel_state stays uninitialised. Gone before other tests fork ranks."""
    cpu.install()
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    parallel_state._set_global_memory_buffer()
    tensor_parallel.model_parallel_cuda_manual_seed(1, tp_rank=0, ep_rank=0, etp_rank=0)
    yield
    assert not parallel_state.is_initialized()
    dist.destroy_process_group()


def parse_default_args(*words):
    """Megatron's arguments as a script with the any2any defaults would have them, for one rank."""

    def add_arguments(parser):
        add_any2any_arguments(parser)
        parser.set_defaults(**MEGATRON_DEFAULTS, **(cpu.ARGUMENT_DEFAULTS if cpu.is_cpu() else {}))
        return parser

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["pretrain", *words])
        patch.setenv("RANK", "0")
        patch.setenv("WORLD_SIZE", "1")
        args = parse_args(add_arguments)
        workload_from_args(args)  # sets what follows from others
        return validate_args(args)


@pytest.fixture(scope="module")
def args(one_rank):
    return parse_default_args()


@pytest.fixture(scope="module")
def model(args):
    return Any2Any.from_args(args, workload_from_args(args))


def groups_of(group, stage: int = 0, num_stages: int = 1) -> ProcessGroupCollection:
    """Every group is `group`, except that the rank in pp is `stage`."""
    groups = ProcessGroupCollection(**{f.name: group for f in fields(ProcessGroupCollection)})
    groups.pp = SimpleNamespace(rank=lambda: stage, size=lambda: num_stages)
    return groups


@pytest.fixture
def build_stages(model):
    """build_stages(pp=...) -> module -> its stages, all in this process."""

    def build(**pp):
        stages = {}
        for name in model.workload.by_name:
            layout = Layout(pp=pp.get(name, 1))
            placed = ModulePlan(ranks=RankSet.of(range(layout.pp)), layout=layout)
            stages[name] = [
                model.build_stage(name, placed, stage, groups_of(dist.group.WORLD, stage, layout.pp))
                for stage in range(layout.pp)
            ]
        return stages

    return build


def inputs_of(model, name, batch, imports=None, items=None) -> StageInputs:
    """What a stage that is its whole module gets for all items of a batch, or for some (then without rows)."""
    found = model.list_items(batch)[name]
    shard = shard_of(ALONE, range(len(found)) if items is None else items, found.tokens)
    places = {}
    for edge in model.workload.edges:
        links = model.list_links(edge, batch)
        places[edge.source, edge.target] = (
            place(links.source_items, links.source_starts, links.rows),
            place(links.target_items, links.target_starts, links.rows),
        )
    given = imports or {}
    return StageInputs(
        shard=shard,
        tensors=model.select_inputs(name, batch, shard),
        imports=given,
        imports_at={s: at for (s, t), (_, at) in places.items() if t == name and s in given},
        exports_at={t: at for (s, t), (at, _) in places.items() if s == name} if items is None else {},
    )


def place(items, starts, rows):
    tokens, owners = rows_of(items, starts, rows)
    return torch.from_numpy(tokens), torch.from_numpy(owners)


def forward_all(model, stages, batch):
    """module -> output of its last stage (None without items), in one process, every sample on the one lane."""
    outputs = {}
    for name in model.workload.by_name:
        if not len(model.list_items(batch)[name]):
            outputs[name] = None
            continue
        sources = [source for source, target in model.workload.edge_pairs if target == name and outputs[source]]
        inputs = inputs_of(model, name, batch, {source: outputs[source].exports[name] for source in sources})
        output = stages[name][0](inputs)
        for stage in stages[name][1:]:
            output = stage(replace(inputs, hidden=output.hidden))
        outputs[name] = output
    return outputs


def mean_loss(outputs) -> torch.Tensor:
    """The one loss: every loss token of the batch counts the same."""
    with_loss = [output for output in outputs.values() if output is not None and output.loss is not None]
    return sum(output.loss for output in with_loss) / sum(output.num_tokens for output in with_loss)


@pytest.fixture
def run_model(model):
    """run_model(stages, batch) -> (loss, report)."""

    def run(stages, batch):
        outputs = forward_all(model, stages, batch)
        report = {}
        for output in outputs.values():
            report |= {} if output is None else output.report
        return mean_loss(outputs), {name: (total / count).item() for name, (total, count) in report.items()}

    return run
