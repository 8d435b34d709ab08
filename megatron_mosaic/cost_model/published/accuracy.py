"""The cost model against published measurements: errors per file and family, refusals with their reasons.

In-sample: the constants of gpu_types/*.yaml. Out-of-sample: for each row the constants of the fold that left it out;
a row of a file that was not fitted to is out-of-sample as it is.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path

import yaml

from megatron_mosaic.cost_model.hardware.catalogue import load_gpu_type
from megatron_mosaic.cost_model.published.cells import Row
from megatron_mosaic.cost_model.published.constants import BOUNDS, FITTED_FILES, at_bound, fold_of, with_constants
from megatron_mosaic.cost_model.published.prediction import estimate_case
from megatron_mosaic.cost_model.published.regret import group_layouts
from megatron_mosaic.cost_model.published.rows import Case, load_table, try_case
from megatron_mosaic.errors import ConfigError, MosaicError
from megatron_mosaic.plan.cluster import GpuType

PUBLISHED = Path(str(files(__package__)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """A predicted row. Zero where nothing was measured."""

    case: Case
    file: str
    step_s: float
    fold_step_s: float
    peak_bytes: float

    @property
    def time_error_frac(self) -> float:
        return self.step_s / self.case.measured_s - 1

    @property
    def fold_error_frac(self) -> float:
        return self.fold_step_s / self.case.measured_s - 1

    @property
    def memory_error_frac(self) -> float:
        return self.peak_bytes / self.case.measured_bytes - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """Errors over a set of rows, as fractions; None where no row measured it."""

    rows: int
    refused: Counter[str]
    compared: tuple[Comparison, ...]

    def as_dict(self) -> dict[str, object]:
        timed = [each for each in self.compared if each.case.measured_s]
        errors = [each.time_error_frac for each in timed]
        memory = [each.memory_error_frac for each in self.compared if each.case.measured_bytes]
        groups = group_layouts((each.case, each.fold_step_s) for each in timed)
        regrets = [group.regret_frac for group in groups]
        by_format: dict[str, list[float]] = {}
        for each in timed:
            by_format.setdefault(each.case.setup.format, []).append(abs(each.fold_error_frac))
        return {
            "rows": self.rows,
            "predicted": len(self.compared),
            "refused": sum(self.refused.values()),
            "reasons": dict(self.refused.most_common()),
            "time_mape": _mean(map(abs, errors)),
            "time_p90": _quantile(map(abs, errors), 0.9),
            "time_bias": _mean(errors),
            "time_mape_out_of_sample": _mean(abs(each.fold_error_frac) for each in timed),
            "time_mape_out_of_sample_by_format": {name: _mean(errors) for name, errors in by_format.items()},
            "timed_by_format": {name: len(errors) for name, errors in by_format.items()},
            "layout_groups": len(groups),
            "regret_mean": _mean(regrets),
            "regret_worst": max(regrets, default=None),
            "rank_correlation": _mean(group.rank_correlation for group in groups),
            "by_kind": {kind: _errors(part) for kind, part in _by_kind(timed).items()},
            "memory_mape": _mean(map(abs, memory)),
            "memory_median": _quantile(map(abs, memory), 0.5),
        }


def _by_kind(compared: Iterable[Comparison]) -> dict[str, list[Comparison]]:
    """Models of dense layers, and those with experts."""
    found: dict[str, list[Comparison]] = {}
    for each in compared:
        sparse = any(module.num_experts for module in each.case.workload.modules)
        found.setdefault("experts" if sparse else "dense", []).append(each)
    return found


def _errors(compared: Sequence[Comparison]) -> dict[str, object]:
    memory = [abs(each.memory_error_frac) for each in compared if each.case.measured_bytes]
    return {
        "rows": len(compared),
        "time_mape": _mean(abs(each.time_error_frac) for each in compared),
        "time_mape_out_of_sample": _mean(abs(each.fold_error_frac) for each in compared),
        "memory_mape": _mean(memory),
    }


def _mean(values: Iterable[float]) -> float | None:
    numbers = list(values)
    return math.fsum(numbers) / len(numbers) if numbers else None


def _quantile(values: Iterable[float], share: float) -> float | None:
    numbers = sorted(values)
    return numbers[math.ceil(share * len(numbers)) - 1] if numbers else None


@cache
def _fold_gpus(name: str) -> tuple[GpuType, ...]:
    path = PUBLISHED / "folds" / f"{name}.yaml"
    if not path.exists():
        return ()
    gpu = load_gpu_type(name)
    return tuple(with_constants(gpu, constants) for constants in yaml.safe_load(path.read_text(encoding="utf-8")))


def constant_spreads() -> dict[str, dict[str, dict[str, float | bool]]]:
    """GPU type -> fitted constant -> its value, the lowest and the highest of the folds, whether it is at its bound."""
    found: dict[str, dict[str, dict[str, float | bool]]] = {}
    for path in sorted((PUBLISHED / "folds").glob("*.yaml")):
        gpu, folds = load_gpu_type(path.stem), yaml.safe_load(path.read_text(encoding="utf-8"))
        found[path.stem] = {}
        for name in BOUNDS:
            value, spread = getattr(gpu, name), [fold[name] for fold in folds]
            found[path.stem][name] = {
                "value": value, "low": min(spread), "high": max(spread), "at_bound": at_bound(name, value)
            }  # fmt: skip
    return found


def _validate_rows(file: str, rows: Sequence[Row], *, fitted: bool) -> Report:
    """The report of one table of the schema; `fitted`: constants were fitted to it, so that folds matter."""
    compared: list[Comparison] = []
    refused: Counter[str] = Counter()
    for row in rows:
        case = try_case(row)
        if isinstance(case, str):
            refused[case] += 1
            continue
        try:
            cost = estimate_case(case)
            gpus = _fold_gpus(case.gpu) if fitted else ()
            fold = estimate_case(case, gpus[fold_of(case)]) if gpus else cost
            if not math.isfinite(cost.step_s + fold.step_s + cost.peak_bytes):
                raise OverflowError
        except MosaicError as error:
            refused[" ".join(str(error).split())[:120]] += 1
            continue
        except (OverflowError, ValueError):
            refused["a number beyond what can be computed"] += 1
            continue
        if case.is_incomplete and cost.peak_bytes > case.cluster.gpu.memory_bytes:
            refused["its recomputation is not stated, and without any it does not fit"] += 1
            continue
        compared.append(
            Comparison(case=case, file=file, step_s=cost.step_s, fold_step_s=fold.step_s, peak_bytes=cost.peak_bytes)
        )
    return Report(rows=len(rows), refused=refused, compared=tuple(compared))


def validate_folder(folder: Path) -> dict[str, Report]:
    """Reports by file. Files of another schema (side tables) are left out. ConfigError where nothing is left."""
    try:
        paths = sorted(path for path in folder.iterdir() if path.suffix.lower() == ".csv")
    except OSError as error:
        raise ConfigError(
            "validate: --data",
            got=f"{str(folder)[:200]} ({error.strerror})",
            expected="a folder of CSV files",
            fix="correct the path",
        ) from error
    reports = {}
    for path in paths:
        if path.exists() and not path.is_file():
            continue  # a folder by that name
        header, rows = load_table(path)
        if {"row_id", "n_gpus"} <= {*header}:
            name = path.stem.encode(errors="replace").decode()  # what can be printed of it
            reports[path.name if name in reports else name] = _validate_rows(
                name, rows, fitted=folder == PUBLISHED and name in FITTED_FILES
            )
    if not reports:
        raise ConfigError(
            "validate: --data",
            got=f"no table in {folder}",
            expected="CSV files with the columns of cost_model/published/README.md",
            fix="name another folder",
        )
    return reports


def merge_reports(reports: Sequence[Report]) -> Report:
    """All rows together."""
    refused: Counter[str] = Counter()
    for report in reports:
        refused.update(report.refused)
    compared = tuple(each for report in reports for each in report.compared)
    return Report(rows=sum(report.rows for report in reports), refused=refused, compared=compared)


def by_family(reports: Iterable[Report]) -> dict[str, Report]:
    """Reports of the predicted rows by model family."""
    compared: dict[str, list[Comparison]] = {}
    for each in merge_reports(list(reports)).compared:
        compared.setdefault(each.case.family, []).append(each)
    return {
        family: Report(rows=len(group), refused=Counter(), compared=tuple(group)) for family, group in compared.items()
    }
