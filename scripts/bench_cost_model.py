"""Markdown table: how long a prediction takes for a plan of 10,240 GPUs, and the import of the cost model.

Predictions are by 20 CostModels that remember nothing of other plans, imports by 5 fresh interpreters: medians.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

from megatron_mosaic.cost_model.model import CostModel
from megatron_mosaic.cost_model.published.accuracy import PUBLISHED
from megatron_mosaic.cost_model.published.rows import Case, load_rows, try_case
from megatron_mosaic.cost_model.simulate import simulate

HEAVY = ("torch", "megatron", "scipy")
TP, PP, DP, ENCODER_TP, MICROBATCHES = 8, 8, 160, 4, 8
_IMPORT = (
    "import time; start_s = time.perf_counter(); import megatron_mosaic.cost_model.simulate, sys; "
    f"print(time.perf_counter() - start_s, *sorted({set(HEAVY)} & {{*sys.modules}}))"
)


def build_large_case() -> Case:
    """A 64-layer VLM, its encoder on all ranks."""
    num_gpus = TP * PP * DP
    degrees = {"n_gpus": num_gpus, "tp": TP, "pp": PP, "enc_tp": ENCODER_TP, "enc_dp": num_gpus // ENCODER_TP}
    shape = {
        "gbs": DP * MICROBATCHES,
        "num_microbatches": MICROBATCHES,
        "num_layers": 64,
        "hidden": 8192,
        "heads": 64,
        "kv_heads": 8,
    }
    row = load_rows(PUBLISHED / "mimo_vlm_h100.csv")[0]
    case = try_case({**row, **{key: str(value) for key, value in (degrees | shape).items()}})
    assert isinstance(case, Case), case
    return case


def measure_prediction_s(case: Case) -> float:
    seconds = []
    for _ in range(20):
        model = CostModel(case.workload, case.cluster)
        start_s = time.perf_counter()
        simulate(case.plan, model)
        seconds.append(time.perf_counter() - start_s)
    return statistics.median(seconds)


def measure_import() -> tuple[float, str]:
    """Seconds, and the heavy packages that came along."""
    found = [subprocess.check_output([sys.executable, "-c", _IMPORT], text=True).split() for _ in range(5)]
    return statistics.median(float(seconds) for seconds, *_ in found), ", ".join(found[0][1:]) or "none"


def main() -> None:
    case = build_large_case()
    import_s, heavy = measure_import()
    print("| what | median |\n|---|---:|")
    print(f"| `simulate`, {case.plan.world_size} GPUs | {1e3 * measure_prediction_s(case):.2f} ms |")
    print(f"| import of `megatron_mosaic.cost_model.simulate` | {import_s:.2f} s |")
    print(f"| of {', '.join(HEAVY)} it imports | {heavy} |")


if __name__ == "__main__":
    main()
