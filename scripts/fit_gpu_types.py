"""Fit the constants of gpu_types/*.yaml to the published steps, and those of each fold. Arguments: families.

GPU types of one family have the same SMs, so they share constants, all but calibration.OWN; a type without rows takes
those of the family's first. Weights: each file counts alike in a
family, however many rows it has. A launch is the host's work, and hosts are of the GPUs' generation.
"""

import sys
from collections import Counter
from pathlib import Path

import yaml

from megatron_mosaic.cost_model.published import constants as calibration
from megatron_mosaic.cost_model.published.constants import (
    BOUNDS,
    NUM_FOLDS,
    Constants,
    at_bound,
    fit_constants,
    fold_of,
)
from megatron_mosaic.cost_model.published.prediction import estimate_case
from megatron_mosaic.cost_model.published.rows import Case, load_rows, try_case

PUBLISHED = Path(calibration.__file__).parent
GPU_TYPES = PUBLISHED.parent / "hardware" / "gpu_types"
FAMILIES = {
    "ampere": ("a100_sxm_80gb", "a100_sxm_40gb"),
    "hopper": ("h100_sxm", "h200_sxm", "h100_sxm_96gb"),
    "blackwell": ("b200_sxm", "b300_sxm", "gb200", "gb300"),
}
EVERY = 3  # of files with more than 150 rows, every third row is enough to fit seven numbers


def load_cases() -> list[tuple[str, Case]]:
    found = []
    for name in calibration.FITTED_FILES:
        rows = load_rows(PUBLISHED / f"{name}.csv")
        for row in rows[:: EVERY if len(rows) > 150 else 1]:
            case = try_case(row)
            if not isinstance(case, Case) or not case.measured_s:
                continue
            if case.is_incomplete and not fits(case):
                continue
            if name not in calibration.ATTENTION_ONLY or is_attention_bound(case):
                found.append((name, case))
    return found


def fits(case: Case) -> bool:
    return estimate_case(case).peak_bytes <= case.cluster.gpu.memory_bytes


def is_attention_bound(case: Case) -> bool:
    """Whether attention decides, with kernels of the GPU's own time: on a Hopper, those rows ran Ampere's."""
    return case.workload.backbone.tokens_per_item >= calibration.LONG and case.gpu.startswith("a100")


def main(names: list[str]) -> None:
    cases = load_cases()
    for family in names or FAMILIES:
        mine = [(file, case) for file, case in cases if case.gpu in FAMILIES[family]]
        counts = Counter(file for file, _ in mine)
        weighted = [(case, (1 / counts[file]) ** 0.5 * 5) for file, case in mine]
        fixed: Constants = {}
        found = fit_constants(weighted, fixed)
        folds = []
        for fold in range(NUM_FOLDS):
            train = [(case, weight) for case, weight in weighted if fold_of(case) != fold]
            folds.append(fit_constants(train, fixed, start=found))
        write(family, found, folds, counts)
        for gpu, constants in found.items():
            for key, value in constants.items():
                spread = [fold.get(gpu, constants)[key] for fold in folds]
                print(
                    f"{gpu:14} {key:26} {value:.4g}, over the folds {min(spread):.4g} to {max(spread):.4g}"
                    f"{', at its bound' if at_bound(key, value) else ''}",
                    flush=True,
                )
        print(f"  {family}: {dict(counts)}", flush=True)


def read(name: str) -> dict:
    return yaml.safe_load((GPU_TYPES / f"{name}.yaml").read_text(encoding="utf-8"))


def write(family: str, found: dict, folds: list[dict], counts: Counter[str]) -> None:
    rows = ", ".join(f"{count} rows of {file}" for file, count in counts.items())
    for name in FAMILIES[family]:
        data, sibling = read(name), name if name in found else FAMILIES[family][0]
        for key in BOUNDS:
            data[key] = found[sibling][key]
            data["sources"][key] = "scripts/fit_gpu_types.py, see fitted_to"
        data["sources"]["fitted_to"] = f"{family}, {' '.join(FAMILIES[family])}: {rows}"
        if sibling != name:
            data["sources"]["fitted_to"] += f"; none is of {name}, which has the constants of {sibling}"
        text = yaml.safe_dump(data, sort_keys=False, width=160)
        (GPU_TYPES / f"{name}.yaml").write_text(text, encoding="utf-8")
        path = PUBLISHED / "folds" / f"{name}.yaml"
        if sibling != name:
            path.unlink(missing_ok=True)
        else:
            table: list[Constants] = [fold.get(name, found[name]) for fold in folds]
            path.write_text(yaml.safe_dump(table, sort_keys=False), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
