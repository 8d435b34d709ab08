"""`mosaic calibrate`: measures this machine into a Profile, with the real modules and real gloo collectives.

    module time   pre / layer / post of every module, over items, tp and threads  (forward, backward)
    collectives   all_reduce, all_gather, reduce_scatter, p2p over bytes and ranks
    optimizer     one Megatron optimizer step over parameters
    interference  blocks alone and beside each other: what lanes on tracks of one rank cost each other
    crowding      by how much ranks that compute at once slow each other down
    overheads     what actions, samples and steps of a real single-rank `pretrain()` run cost beyond all that

A group of several ranks slows itself down while it is measured; the cost model takes that factor out.
"""

from __future__ import annotations

import json
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist

from megatron_mosaic.any2any import pretrain
from megatron_mosaic.any2any.arguments import workload_of_command_line
from megatron_mosaic.any2any.data import collate
from megatron_mosaic.any2any.definition import Any2Any
from megatron_mosaic.calibrate.beside.colocated import measure_interference
from megatron_mosaic.calibrate.collectives import measure_collectives
from megatron_mosaic.calibrate.crowding import measure_crowding
from megatron_mosaic.calibrate.modules import ITEMS, REPEATS, ModuleBench
from megatron_mosaic.calibrate.one_rank import one_rank_plan
from megatron_mosaic.calibrate.overheads import fit_overheads
from megatron_mosaic.cost_model.hardware.catalogue import local_cluster
from megatron_mosaic.cost_model.hardware.profile import FORMAT_VERSION, Profile
from megatron_mosaic.cost_model.model import CostModel
from megatron_mosaic.cost_model.simulate import simulate
from megatron_mosaic.launch.forked import run_forked, with_command_line
from megatron_mosaic.plan import Plan
from megatron_mosaic.plan.plan_file import save_plan
from megatron_mosaic.plan.workload import Workload
from megatron_mosaic.runtime.arguments import parse_and_validate_args
from megatron_mosaic.runtime.telemetry.step_report import TIMELINE_FILE
from megatron_mosaic.schedules.timeline import Span


def calibrate(
    *, num_ranks: int = 4, megatron_args: Sequence[str] = (), progress: Callable[[str], None] = lambda text: None
) -> Profile:
    """The profile of this machine, for plans of up to `num_ranks` ranks; about a minute on two cores."""
    workload = workload_of_command_line(megatron_args)
    cores = psutil.cpu_count(logical=True) or 1
    with tempfile.TemporaryDirectory(prefix="mosaic-calibrate-") as directory:
        progress("modules, collectives, optimizer")
        command = [*megatron_args, "--global-batch-size", str(4 * num_ranks), "--micro-batch-size", "4"]
        run_forked(num_ranks, _measure_rank, command, directory, cores)
        data = json.loads((Path(directory) / "measured.json").read_text())
        progress("blocks beside each other")
        run_forked(1, _measure_interference, directory, data["machine"]["memory_bytes_per_s"])
        interference = json.loads((Path(directory) / "interference.json").read_text())
        progress("overheads of a step")
        spans = _run_one_rank(workload, megatron_args, directory, cores)
    profile = Profile.model_validate(
        {
            "mosaic_profile": FORMAT_VERSION,
            "provenance": {
                "cpu_model": _cpu_model(),
                "date": datetime.now(UTC).strftime("%Y-%m-%d"),
                "versions": {name: version(name) for name in ("torch", "megatron-core", "megatron-mosaic")},
            },
            "machine": data["machine"],
            "workload": workload.name,
            "digest": workload.digest,
            "modules": data["modules"],
            "collectives": data["collectives"],
            "optimizer": data["optimizer"],
            "crowding": data["crowding"],
            "interference": interference,
        }
    )
    model = CostModel(workload, local_cluster(profile, cores), profile)
    overheads = fit_overheads(simulate(_one_rank(workload), model), spans)
    return profile.model_copy(update={"overheads": overheads})


def _measure_rank(command: list[str], directory: str, cores: int) -> None:
    """Collective over all ranks. Rank 0 writes `measured.json`."""
    sys.argv[1:] = command
    args, _ = parse_and_validate_args(
        pretrain.workload_from_args, pretrain.add_any2any_arguments, pretrain.MEGATRON_DEFAULTS
    )
    dist.init_process_group("gloo", world_size=args.world_size, rank=args.rank, timeout=timedelta(minutes=2))
    definition = Any2Any.from_args(args, pretrain.workload_from_args(args))
    samples = pretrain.make_datasets(args, definition.workload)((256, 1, 1))[0]
    batch = collate([samples[i] for i in range(4 * max(ITEMS))])
    modules: dict[str, dict[int, dict[int, list[dict[str, Any]]]]] = {}
    optimizer: dict[int, float] = {}
    for tp in (degree for degree in (1, 2, 4) if degree <= dist.get_world_size()):
        for name in definition.workload.by_name:
            bench = ModuleBench(args, definition, name, tp)
            for threads in _thread_counts(cores // tp):
                modules.setdefault(name, {}).setdefault(tp, {})[threads] = bench.measure(batch, threads)
            if tp == 1:
                optimizer.update(bench.measure_optimizer())
            bench.close()
    crowding = measure_crowding(definition.workload.backbone)
    collectives = measure_collectives(Path(directory) / "messages-timed")
    if dist.get_rank() == 0:
        measured = {
            "machine": _measure_machine(cores),
            "modules": modules,
            "collectives": collectives,
            "crowding": crowding,
            "optimizer": [{"params": params, "seconds": seconds} for params, seconds in sorted(optimizer.items())],
        }
        (Path(directory) / "measured.json").write_text(json.dumps(measured))
    dist.barrier()


def _measure_interference(directory: str, bandwidth_bytes_per_s: float) -> None:
    """A rank by itself. Writes `interference.json`."""
    found = measure_interference(bandwidth_bytes_per_s)
    (Path(directory) / "interference.json").write_text(json.dumps(found))


def _thread_counts(cores_per_rank: int) -> list[int]:
    """1, 2, 4, ... up to the cores that one of the ranks can have."""
    return [1 << i for i in range(max(1, cores_per_rank).bit_length())]


def _measure_machine(cores: int) -> dict[str, float]:
    """Rates of the whole host, with all cores."""
    torch.set_num_threads(cores)
    size = 1024
    a, b = torch.randn(size, size), torch.randn(size, size)
    source, target = torch.randn(1 << 24), torch.empty(1 << 24)
    gemm_s = min(_repeat(lambda: torch.mm(a, b)))
    copy_s = min(_repeat(lambda: target.copy_(source)))
    torch.set_num_threads(1)
    return {
        "cores": cores,
        "memory_bytes": float(psutil.virtual_memory().total),
        "flops_per_s": 2.0 * size**3 / gemm_s,
        "memory_bytes_per_s": 2.0 * source.numel() * source.element_size() / copy_s,
    }


def _repeat(work: Callable[[], object], times: int = REPEATS) -> Iterator[float]:
    for _ in range(times):
        started = time.perf_counter()
        work()
        yield time.perf_counter() - started


def _one_rank(workload: Workload) -> Plan:
    modules = [module.name for module in workload.modules]
    return one_rank_plan(workload.name, modules, global_batch_size=16, micro_batch_size=4)


def _run_one_rank(workload: Workload, megatron_args: Sequence[str], directory: str, cores: int) -> list[Span]:
    """The median step of a real run with every module on one rank, which waits for nobody.

    It has the one thread that it would have if every core had a rank: ranks of several pay for waking them, too.
    """
    path = f"{directory}/one-rank.yaml"
    save_plan(_one_rank(workload), path)
    command = [*megatron_args, "--mosaic-plan", path, "--mosaic-report", directory, "--train-iters", "24"]
    command += ["--eval-iters", "0", "--log-interval", "1000"]
    run_forked(1, with_command_line, command, pretrain.main, env={"LOCAL_WORLD_SIZE": str(cores)})
    return [Span(*span) for span in json.loads((Path(directory) / TIMELINE_FILE).read_text())["spans"]]


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
