"""Plan files: YAML in and out, checked against one pydantic schema whose errors name the path."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, ValidationError

from megatron_mosaic.errors import PlanError
from megatron_mosaic.frozen import FrozenMap
from megatron_mosaic.plan import Layout, ModulePlan, Plan, Prediction, Quota, RankSet, Recompute, ScheduleChoice
from megatron_mosaic.plan.cluster import ClusterField
from megatron_mosaic.plan.training import TrainingSection, TrainingSetup
from megatron_mosaic.plan.yaml_text import (
    FORM_NAME,
    FORM_SECTION,
    MAX_AMOUNT,
    MAX_COUNT,
    Schema,
    describe_violation,
    parse_section,
)
from megatron_mosaic.text_file import FileKind, read_text_file, show_path

if TYPE_CHECKING:
    from megatron_mosaic.plan.tasks.waves import WavePlan

FORMAT_VERSION = 1
SCHEMA_FILE = Path(__file__).parents[1] / "conf" / "plan.schema.json"
PLAN_FILE = FileKind(what="a plan file", error=PlanError, fix="make one with `mosaic plan --out FILE`")

Degree = Annotated[int, Field(strict=True, ge=1, le=MAX_COUNT)]
# YAML reads a bare `ranks: 0` as an integer; a single rank is fine without quotes
RankText = Annotated[str, BeforeValidator(lambda value: str(value) if type(value) is int else value)]


class LayoutFile(Schema):
    tp: Degree = 1
    cp: Degree = 1
    pp: Degree = 1
    vpp: Degree = 1
    dp: Degree = 1
    ep: Degree = 1
    etp: Degree = 1


class ModuleFile(Schema):
    ranks: RankText = Field(description='global ranks, e.g. "0-3,8-11"')
    layout: LayoutFile = LayoutFile()
    quota: float = Field(default=1.0, gt=0, le=1, description="share of the GPU's SMs; omitted = whole GPU")
    unit: Degree | None = Field(default=None, description="backbone microbatches covered by one action")
    recompute: Recompute = Recompute.none
    sequence_parallel: bool = Field(default=False, strict=True, description="split tokens over tp between layers")


class PredictedFile(Schema):
    step_s: float = Field(ge=0, le=MAX_AMOUNT)
    peak_bytes: float = Field(ge=0, le=MAX_AMOUNT)
    cost_model: str


class ScheduleFile(BaseModel):
    """A schedule with parameters, e.g. `{name: nested, warmup_units: 4}`; its builder knows which there are."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, Degree] = Field(init=False)

    name: str


def _form_of_schedule(value: object) -> str:
    return FORM_NAME if isinstance(value, str) else FORM_SECTION


ScheduleField = Annotated[
    Annotated[str, Tag(FORM_NAME)] | Annotated[ScheduleFile, Tag(FORM_SECTION)], Discriminator(_form_of_schedule)
]


class PlanFile(Schema):
    """Schema of a plan file, format version 1."""

    mosaic_plan: int = Field(strict=True, description="format version", ge=FORMAT_VERSION, le=FORMAT_VERSION)
    workload: str
    digest: str = Field(default="", description="digest of the workload the plan was made for")
    world_size: Degree
    global_batch_size: Degree = Field(description="samples per optimizer step")
    micro_batch_size: Degree = Field(description="samples per backbone microbatch and backbone dp slot")
    cluster: ClusterField | None = Field(default=None, description="what it was made for: a shipped name, or values")
    training: TrainingSection | None = Field(default=None, description="number format, sharding, overlap")
    schedule: ScheduleField
    modules: dict[str, ModuleFile]
    predicted: PredictedFile | None = None


def plan_schema() -> dict[str, Any]:
    """JSON Schema of the plan file; `conf/plan.schema.json` is this, written out."""
    return PlanFile.model_json_schema()


def load_plan(path: str | Path) -> Plan:
    """The plan in a YAML file. PlanError names the file and the key."""
    return parse_plan(read_text_file(path, PLAN_FILE), where=show_path(path))


def parse_plan(text: str, *, where: str = "plan") -> Plan:
    """The plan written in YAML text."""
    data = parse_section(text, PLAN_FILE, where=where)
    if "waves" in data:
        raise PlanError(
            f"{where}: waves",
            got="a plan in waves, for several tasks",
            expected="a plan of modules: nothing can run waves yet",
            fix="use `mosaic show` or `mosaic simulate`, which read both",
        )
    try:
        checked = PlanFile.model_validate(data)
    except ValidationError as error:
        raise PlanError(**describe_violation(error, where=f"{where}: ", known="a key of the plan format")) from error
    try:
        return _to_plan(checked)
    except PlanError as error:
        raise PlanError(f"{where}: {error.where}", got=error.got, expected=error.expected, fix=error.fix) from error


def format_plan(plan: Plan) -> str:
    """YAML text; `parse_plan(format_plan(plan)) == plan`. Values at their defaults are left out."""
    modules: dict[str, Any] = {}
    for name, module in plan.modules.items():
        layout = {axis: getattr(module.layout, axis) for axis in ("tp", "cp", "pp", "dp")}
        layout |= {
            axis: getattr(module.layout, axis) for axis in ("vpp", "ep", "etp") if getattr(module.layout, axis) > 1
        }
        entry: dict[str, Any] = {"ranks": str(module.ranks), "layout": layout}
        if module.quota.share != 1:
            entry["quota"] = module.quota.share
        if module.unit:
            entry["unit"] = module.unit
        if module.recompute is not Recompute.none:
            entry["recompute"] = module.recompute.value
        if module.sequence_parallel:
            entry["sequence_parallel"] = True
        modules[name] = entry
    data, predicted = format_values(plan)
    parameters = plan.schedule.parameters
    data["schedule"] = {"name": plan.schedule.name, **parameters} if parameters else plan.schedule.name
    data["modules"] = modules
    return yaml.safe_dump(data | predicted, sort_keys=False, default_flow_style=None, width=120)


def format_values(plan: Plan | WavePlan) -> tuple[dict[str, Any], dict[str, Any]]:
    """What every kind of plan says, for YAML: the keys before its schedule, and those behind all."""
    data: dict[str, Any] = {"mosaic_plan": FORMAT_VERSION, "workload": plan.workload}
    if plan.digest:
        data["digest"] = plan.digest
    sizes = ("world_size", "global_batch_size", "micro_batch_size")
    data |= {key: getattr(plan, key) for key in sizes if hasattr(plan, key)}
    if plan.cluster:
        data["cluster"] = _plain(plan.cluster)
    if plan.training is not None:
        data["training"] = {key: _plain(getattr(plan.training, key)) for key in TrainingSection.model_fields}
    if plan.predicted is None:
        return data, {}
    return data, {"predicted": {key: getattr(plan.predicted, key) for key in ("step_s", "peak_bytes", "cost_model")}}


def save_plan(plan: Plan, path: str | Path) -> None:
    """Write the plan; the directory must exist."""
    try:
        Path(path).write_text(format_plan(plan), encoding="utf-8")
    except OSError as error:
        raise PlanError(str(path), got=str(error), expected="a writable path", fix="create the directory") from error


def _plain(value: Any) -> Any:
    """For YAML: frozen mappings as dicts, enums as text."""
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    return value.value if isinstance(value, StrEnum) else value


def _to_plan(checked: PlanFile) -> Plan:
    modules = {}
    for name, module in checked.modules.items():
        try:
            modules[name] = ModulePlan(
                ranks=RankSet.parse(module.ranks),
                layout=Layout(**module.layout.model_dump()),
                quota=Quota(share=module.quota),
                unit=module.unit or 0,
                recompute=module.recompute,
                sequence_parallel=module.sequence_parallel,
            )
        except PlanError as error:
            raise PlanError(
                f"modules.{name}.{error.where}", got=error.got, expected=error.expected, fix=error.fix
            ) from error
    return Plan(
        workload=checked.workload,
        digest=checked.digest,
        world_size=checked.world_size,
        global_batch_size=checked.global_batch_size,
        micro_batch_size=checked.micro_batch_size,
        cluster=to_cluster(checked.cluster),
        training=TrainingSetup(**checked.training.model_dump()) if checked.training else None,
        schedule=_to_schedule(checked.schedule),
        modules=modules,
        predicted=Prediction(**checked.predicted.model_dump()) if checked.predicted else None,
    )


def to_cluster(checked: ClusterField | None) -> str | FrozenMap[str, Any]:
    """As a plan holds it."""
    if isinstance(checked, BaseModel):
        return FrozenMap(checked.model_dump(exclude_defaults=True) | {"kind": checked.kind})
    return checked or ""


def _to_schedule(checked: str | ScheduleFile) -> ScheduleChoice:
    if isinstance(checked, str):
        return ScheduleChoice(checked)
    return ScheduleChoice(checked.name, FrozenMap(checked.__pydantic_extra__))
