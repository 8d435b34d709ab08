"""`mosaic validate`: the cost model against published measurements."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

from megatron_mosaic.cli.output import print_json, print_table
from megatron_mosaic.cost_model.published.accuracy import (
    PUBLISHED,
    Report,
    by_family,
    constant_spreads,
    merge_reports,
    validate_folder,
)
from megatron_mosaic.cost_model.published.side_tables import compare_memory
from megatron_mosaic.errors import ConfigError

_COLUMNS = ("rows", "predicted", "time_mape", "time_p90", "time_bias", "time_mape_out_of_sample", "memory_mape")
_TITLES = ("rows", "predicted", "time", "p90", "bias", "time, out of sample", "memory")


def main(arguments: argparse.Namespace) -> int:
    """Print the errors per file and family, and why rows were refused."""
    reports = validate_folder(Path(arguments.data) if arguments.data else PUBLISHED)
    memory = compare_memory(Path(arguments.data) if arguments.data else PUBLISHED)
    overall = merge_reports(list(reports.values()))
    if arguments.plot:
        _plot(reports, arguments.plot)
    if arguments.json:
        print_json(
            {
                "files": {name: report.as_dict() for name, report in reports.items()},
                "families": {name: report.as_dict() for name, report in by_family(reports.values()).items()},
                "overall": overall.as_dict(),
                "constants": constant_spreads(),
                "korthikanti2022_memory": [asdict(row) for row in memory],
            }
        )
        return 0
    _print("published measurements, mean absolute errors", "file", {**reports, "all": overall})
    _print("by family", "family", by_family(reports.values()))
    _print_choices({**reports, "all": overall})
    for gpu, constants in constant_spreads().items():
        for name, each in constants.items():
            bound = ", at its bound: an effect is missing" if each["at_bound"] else ""
            print(f"  {gpu} {name}: {each['value']:.4g}, over the folds {each['low']:.4g} to {each['high']:.4g}{bound}")
    for row in memory:
        errors = f"parameters and optimizer {row.static_error_frac:+.1%}, activations {row.activation_error_frac:+.1%}"
        print(f"  {row.model}, {row.mode}: {errors}")
    print("refused:")
    for name, report in reports.items():
        for reason, count in report.refused.most_common():
            print(f"  {name}: {count} x {reason}")
    return 0


def _print(title: str, first: str, reports: dict[str, Report]) -> None:
    rows = []
    for name, report in reports.items():
        values = report.as_dict()
        rows.append((name, *(_cell(key, values[key]) for key in _COLUMNS)))
    print_table(title, (first, *_TITLES), rows)


def _print_choices(reports: dict[str, Report]) -> None:
    """Of layouts that were measured side by side, how good the predicted best is."""
    rows = []
    for name, report in reports.items():
        values = report.as_dict()
        if values["layout_groups"]:
            cells = (_cell(key, values[key]) for key in ("regret_mean", "regret_worst", "rank_correlation"))
            rows.append((name, str(values["layout_groups"]), *cells))
    titles = ("file", "groups", "regret, mean", "worst", "rank correlation")
    print_table("choosing the predicted best of layouts measured side by side", titles, rows)


def _cell(key: str, value: object) -> str:
    if value is None:
        return "-"
    return str(value) if isinstance(value, int) else f"{100 * float(str(value)):{'+' if 'bias' in key else ''}.1f} %"


def _plot(reports: dict[str, Report], path: str) -> None:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError(
            "validate: --plot",
            got="no matplotlib",
            expected="the plot extra",
            fix="pip install 'megatron-mosaic[plot]'",
        ) from error
    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.subplots()
    for index, (name, report) in enumerate(reports.items()):
        timed = [each for each in report.compared if each.case.measured_s]
        if timed:
            seconds = [each.case.measured_s for each in timed], [each.step_s for each in timed]
            axes.loglog(*seconds, "o^s"[index // 10 % 3], label=name, markersize=4, alpha=0.7)  # ten colours
    axes.axline((1, 1), (10, 10), color="grey", linewidth=0.5)
    axes.set_xlabel("measured step, s")
    axes.set_ylabel("predicted step, s")
    figure.legend(loc="outside right upper", fontsize=8)
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise ConfigError(path, got=str(error), expected="a writable path of a picture", fix="use .png") from error
