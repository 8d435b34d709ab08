"""Fit gpu_types/*.yaml to the published steps, and the constants of each fold. Arguments: GPU types (default: all).

Weights: each file counts alike for a GPU type, however many rows it has.
"""

import sys
from collections import Counter
from pathlib import Path

import yaml

from megatron_mosaic.cost_model import calibration
from megatron_mosaic.cost_model.hardware import load_gpu_type
from megatron_mosaic.cost_model.published_rows import Case, load_rows, try_case

PACKAGE = Path(calibration.__file__).parent
EVERY = 3  # of files with more than 100 rows, every third row is enough to fit seven numbers


def load_cases() -> list[tuple[str, Case]]:
    found = []
    for name in calibration.FITTED_FILES:
        rows = load_rows(PACKAGE / "published" / f"{name}.csv")
        for row in rows[:: EVERY if len(rows) > 150 else 1]:
            case = try_case(row)
            if isinstance(case, Case) and case.measured_s:
                found.append((name, case))
    return found


def main(names: list[str]) -> None:
    cases = load_cases()
    for gpu_name in names or sorted({case.gpu for _, case in cases}):
        mine = [(file, case) for file, case in cases if case.gpu == gpu_name]
        counts = Counter(file for file, _ in mine)
        weighted = [(case, (1 / counts[file]) ** 0.5 * 5) for file, case in mine]
        gpu = calibration.fit_gpu(load_gpu_type(gpu_name), weighted)
        folds = []
        for fold in range(calibration.NUM_FOLDS):
            train = [pair for pair in weighted if calibration.fold_of(pair[0].row_id) != fold]
            folds.append(calibration.fit_gpu(gpu, train, max_evaluations=5) if train else gpu)
        write(gpu_name, gpu, folds, counts)
        print(gpu_name, {key: f"{getattr(gpu, key):.4g}" for key in calibration.BOUNDS}, dict(counts), flush=True)


def write(name: str, gpu, folds: list, counts: Counter) -> None:
    path = PACKAGE / "gpu_types" / f"{name}.yaml"
    data = yaml.safe_load(path.read_text(encoding="utf-8"))
    rows = ", ".join(f"{count} rows of {file}" for file, count in counts.items())
    for key in calibration.BOUNDS:
        data[key] = float(f"{getattr(gpu, key):.5g}")
        data["sources"][key] = f"fitted to {rows} by scripts/fit_gpu_types.py"
    path.write_text(yaml.safe_dump(data, sort_keys=False, width=160), encoding="utf-8")
    path = PACKAGE / "published" / "folds" / f"{name}.yaml"
    path.parent.mkdir(exist_ok=True)
    table = [{key: float(f"{getattr(each, key):.5g}") for key in calibration.BOUNDS} for each in folds]
    path.write_text(yaml.safe_dump(table, sort_keys=False), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
