"""Files of plans in waves: a plan file with `waves` in the place of `modules`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, ValidationError

from megatron_mosaic.errors import PlanError
from megatron_mosaic.plan.cluster import ClusterField
from megatron_mosaic.plan.layout import Layout, RankSet, Recompute
from megatron_mosaic.plan.plan import Prediction
from megatron_mosaic.plan.plan_file import (
    FORMAT_VERSION,
    PLAN_FILE,
    Degree,
    PredictedFile,
    RankText,
    format_values,
    to_cluster,
)
from megatron_mosaic.plan.tasks.waves import Slice, WavePlan
from megatron_mosaic.plan.training import TrainingSection, TrainingSetup
from megatron_mosaic.plan.yaml_text import Schema, describe_violation, parse_section
from megatron_mosaic.text_file import read_text_file, show_path


class SliceLayoutFile(Schema):
    tp: Degree = 1
    dp: Degree = 1


class SliceFile(Schema):
    task: str
    module: str
    layers: RankText = Field(description="layers of the module, from 0, e.g. 0-7")
    ranks: RankText
    layout: SliceLayoutFile = SliceLayoutFile()
    recompute: Recompute = Recompute.none


class WavePlanFile(Schema):
    """Schema of a plan in waves, format version 1."""

    mosaic_plan: Annotated[int, Field(strict=True, ge=FORMAT_VERSION, le=FORMAT_VERSION)]
    workload: str
    digest: str = ""
    world_size: Degree
    global_batch_size: Degree
    cluster: ClusterField | None = None
    training: TrainingSection | None = None
    schedule: Literal["waves"]
    waves: list[list[SliceFile]]
    predicted: PredictedFile | None = None


def load_waves(path: str | Path) -> WavePlan:
    """The plan in a YAML file. PlanError names the file and the key."""
    return parse_waves(read_text_file(path, PLAN_FILE), where=show_path(path))


def is_waves_file(path: str | Path) -> bool:
    """Whether the file says `waves`, so that `load_waves` is to read it. PlanError where it cannot be read."""
    return "waves" in parse_section(read_text_file(path, PLAN_FILE), PLAN_FILE, where=show_path(path))


def parse_waves(text: str, *, where: str = "plan") -> WavePlan:
    """The plan written in YAML text."""
    data = parse_section(text, PLAN_FILE, where=where)
    try:
        checked = WavePlanFile.model_validate(data)
    except ValidationError as error:
        known = "a key of a plan in waves"
        raise PlanError(**describe_violation(error, where=f"{where}: ", known=known)) from error
    try:
        return WavePlan(
            workload=checked.workload,
            digest=checked.digest,
            world_size=checked.world_size,
            global_batch_size=checked.global_batch_size,
            cluster=to_cluster(checked.cluster),
            training=TrainingSetup(**checked.training.model_dump()) if checked.training else None,
            waves=tuple(tuple(map(_to_slice, wave)) for wave in checked.waves),
            predicted=Prediction(**checked.predicted.model_dump()) if checked.predicted else None,
        )
    except PlanError as error:
        raise PlanError(f"{where}: {error.where}", got=error.got, expected=error.expected, fix=error.fix) from error


def _to_slice(entry: SliceFile) -> Slice:
    layers = RankSet.parse(entry.layers)
    if len(layers.spans) != 1:
        raise PlanError(f"{entry.task}: {entry.module}: layers", got=entry.layers, expected="one span", fix="split it")
    return Slice(
        task=entry.task,
        module=entry.module,
        first_layer=layers.first,
        num_layers=len(layers),
        ranks=RankSet.parse(entry.ranks),
        layout=Layout(tp=entry.layout.tp, dp=entry.layout.dp),
        recompute=entry.recompute,
    )


def format_waves(plan: WavePlan) -> str:
    """YAML text; `parse_waves(format_waves(plan)) == plan`."""
    head, tail = format_values(plan)
    data: dict[str, Any] = {**head, "schedule": "waves", "waves": [[_entry(s) for s in wave] for wave in plan.waves]}
    return yaml.safe_dump(data | tail, sort_keys=False, default_flow_style=None, width=140)


def _entry(each: Slice) -> dict[str, Any]:
    last = each.end_layer - 1
    entry: dict[str, Any] = {
        "task": each.task,
        "module": each.module,
        "layers": f"{each.first_layer}-{last}" if each.num_layers > 1 else str(last),
        "ranks": str(each.ranks),
        "layout": {"tp": each.layout.tp, "dp": each.layout.dp},
    }
    return entry | ({"recompute": each.recompute.value} if each.recompute is not Recompute.none else {})
