"""Measured tables of one machine: what `mosaic calibrate` writes and the cost model of `cluster=local` reads.

mosaic_profile: 1
provenance: {cpu_model: "...", date: "2026-11-20", versions: {torch: "2.13.0", ...}}
machine: {cores: 2, memory_bytes: 8.0e+9, flops_per_s: 1.0e+11, memory_bytes_per_s: 1.0e+10}
workload: any2any-digits
digest: 0123456789ab
modules: {vision: {1: {2: [{part: layer, items: 4, forward_s: 1.0e-3, backward_s: 2.0e-3}, ...]}}}    # tp, threads
collectives: {all_reduce: {2: [{bytes: 4096, seconds: 1.0e-4}, ...]}}                                 # ranks
optimizer: [{params: 100000, seconds: 1.0e-3}, ...]
crowding: [{ranks: 2, slow_down: 1.3}, ...]
overheads: {action_s: 0.0, step_s: 0.0, sample_s: 0.0}
interference: {residual: 0.4, serial_frac: 0.5, cache_bytes: 1.0e+6, layer_host_s: 1.0e-3, num_pairs: 4, ...}
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import AfterValidator, Field, ValidationError

from megatron_mosaic.errors import ProfileError
from megatron_mosaic.plan.yaml_text import MAX_AMOUNT, MAX_COUNT, MAX_SECONDS, Schema, describe_violation, parse_section
from megatron_mosaic.text_file import FileKind, read_text_file, show_path

FORMAT_VERSION = 1
CALIBRATE = "run `mosaic calibrate`"
PROFILE = FileKind(what="a profile of this machine", error=ProfileError, fix=f"{CALIBRATE}, or give --profile")

Amount = Annotated[float, Field(ge=1, le=MAX_AMOUNT)]  # of bytes or operations, also per second
PositiveSeconds = Annotated[float, Field(gt=0, le=MAX_SECONDS)]
Seconds = Annotated[float, Field(ge=0, le=MAX_SECONDS)]
Count = Annotated[int, Field(strict=True, ge=1, le=MAX_AMOUNT)]
Degree = Annotated[int, Field(ge=1, le=MAX_COUNT)]  # a key of a mapping: JSON knows text keys only, so "2" is 2


class Part(StrEnum):
    """What a module point measures: one transformer layer, what comes before the first, or after the last."""

    pre = "pre"
    layer = "layer"
    post = "post"


class Operation(StrEnum):
    """Collectives. All but all_to_all are measured here. `p2p`: one rank sends, another receives."""

    all_reduce = "all_reduce"
    all_gather = "all_gather"
    reduce_scatter = "reduce_scatter"
    all_to_all = "all_to_all"
    p2p = "p2p"


def _ascending[Row](key: Callable[[Row], Any], what: str) -> Callable[[Sequence[Row]], Sequence[Row]]:
    def check(rows: Sequence[Row]) -> Sequence[Row]:
        for before, after in pairwise(rows):
            if not key(before) < key(after):
                raise ValueError(f"points must ascend by {what}: {key(before)} stands before {key(after)}")
        return rows

    return check


class Provenance(Schema):
    """Where, when and with which software the numbers were measured."""

    cpu_model: str = Field(min_length=1)
    date: str = Field(min_length=1)
    versions: Mapping[str, str]


class Machine(Schema):
    """The whole host: `flops_per_s` of a large fp32 matrix product, `memory_bytes_per_s` of a large copy, all cores."""

    cores: Annotated[int, Field(strict=True, ge=1, le=MAX_COUNT)]
    memory_bytes: Amount
    flops_per_s: Amount
    memory_bytes_per_s: Amount


class ModulePoint(Schema):
    """Seconds of one part for `items` items on one rank, while all `tp` ranks of the group run it.

    Communication inside the tp group is included. `pre` and `post` exclude the layers.
    """

    part: Part
    items: Count
    forward_s: Seconds
    backward_s: Seconds


class CollectivePoint(Schema):
    """Seconds of one operation. `bytes`: of the full tensor (all_reduce: the buffer; all_gather: the gathered result;
    reduce_scatter: the input; p2p: the message)."""

    bytes: Count
    seconds: PositiveSeconds


class OptimizerPoint(Schema):
    """Seconds of one optimizer step of one rank over this many parameters of its own."""

    params: Count
    seconds: PositiveSeconds


class CrowdPoint(Schema):
    """By which factor one rank's computing takes longer while so many ranks compute, a thread each: for a turn on the
    cores, and for caches and execution units that they share."""

    ranks: Degree
    slow_down: Annotated[float, Field(ge=1, le=MAX_COUNT)]


class Overheads(Schema):
    """Seconds beyond the modules' own: of each action, of each step behind its last action, and of loading each sample
    of the global batch (on every rank). Zero: not seen in the measurement."""

    action_s: Seconds = 0.0
    step_s: Seconds = 0.0
    sample_s: Seconds = 0.0


CrowdPoints = Annotated[
    tuple[CrowdPoint, ...],
    AfterValidator(_ascending(lambda p: p.ranks, "ranks")),
]


class InterferenceFit(Schema):
    """What modules beside each other on a rank cost each other (`effects/interference.py` says what each constant is),
    fitted to `num_pairs` pairs of real blocks. Errors are means over pairs: of those fitted to, and of each by
    constants fitted to the others.

    `layer_host_s`: of a layer's forward and backward, what the host spends on launching.
    """

    residual: Annotated[float, Field(ge=0, le=100)]
    serial_frac: Annotated[float, Field(ge=0, le=1)]
    cache_bytes: Annotated[float, Field(ge=0, le=MAX_AMOUNT)]
    layer_host_s: Seconds
    num_pairs: Count
    error_frac: Annotated[float, Field(ge=0)]
    held_out_error_frac: Annotated[float, Field(ge=0)]


ModulePoints = Annotated[
    tuple[ModulePoint, ...],
    Field(min_length=1),
    AfterValidator(_ascending(lambda p: (list(Part).index(p.part), p.items), "part (pre, layer, post), then items")),
]
CollectivePoints = Annotated[
    tuple[CollectivePoint, ...], Field(min_length=2), AfterValidator(_ascending(lambda p: p.bytes, "bytes"))
]
OptimizerPoints = Annotated[
    tuple[OptimizerPoint, ...], Field(min_length=1), AfterValidator(_ascending(lambda p: p.params, "params"))
]


class Profile(Schema):
    """A measured table. Constructor: known keys, finite numbers, ascending points."""

    mosaic_profile: Annotated[int, Field(strict=True, ge=FORMAT_VERSION, le=FORMAT_VERSION)]
    provenance: Provenance
    machine: Machine
    workload: str
    digest: str
    modules: Mapping[str, Mapping[Degree, Mapping[Degree, ModulePoints]]]  # name -> tp -> threads -> points
    collectives: Mapping[Operation, Mapping[Degree, CollectivePoints]]  # operation -> ranks -> points
    optimizer: OptimizerPoints
    crowding: CrowdPoints = ()  # none: ranks share cores, and nothing else
    overheads: Overheads = Overheads()
    interference: InterferenceFit | None = None  # None: not measured

    @property
    def title(self) -> str:
        """Short name for `predicted.cost_model` in a plan."""
        return f"profile of {self.provenance.cpu_model}, {self.provenance.date}"


def default_profile_path() -> Path:
    """`$MOSAIC_PROFILE`, else `profile.yaml` in the user's cache directory."""
    if chosen := os.environ.get("MOSAIC_PROFILE"):
        return Path(chosen)
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "megatron_mosaic" / "profile.yaml"


def load_profile(path: str | Path) -> Profile:
    """The profile in a YAML (or JSON) file. ProfileError names the file and the key."""
    where = show_path(path)
    data = parse_section(read_text_file(path, PROFILE), PROFILE, where=where)
    try:
        return Profile.model_validate(data)
    except ValidationError as error:
        parts = describe_violation(error, where=f"{where}: ", known="a key of the profile format")
        raise ProfileError(**parts | {"fix": f"{CALIBRATE} again"}) from error


def save_profile(profile: Profile, path: str | Path) -> None:
    """Write the profile; missing directories are made, since the default place is a cache."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(format_profile(profile), encoding="utf-8")
    except OSError as error:
        raise ProfileError(str(path), got=str(error), expected="a writable path", fix="choose another --out") from error


def format_profile(profile: Profile) -> str:
    """YAML text of the profile, one point a line."""
    data = _with_int_keys(profile.model_dump(mode="json", exclude_none=True))
    return yaml.safe_dump(data, sort_keys=False, default_flow_style=None, width=160)


def _with_int_keys(value: Any) -> Any:
    if isinstance(value, dict):
        return {int(key) if key.isdigit() else key: _with_int_keys(inner) for key, inner in value.items()}
    return [_with_int_keys(inner) for inner in value] if isinstance(value, list) else value


def require_finite(where: str, value: float) -> float:
    """The value, or ProfileError when a computation left the range of numbers."""
    if not math.isfinite(value):
        raise ProfileError(
            where,
            got=value,
            expected="a finite number of seconds",
            fix=f"correct sizes and links, or {CALIBRATE} again",
        )
    return value
