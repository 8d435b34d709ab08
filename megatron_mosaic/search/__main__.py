"""`python -m megatron_mosaic.search`: the planner as a plain Hydra app: --multirun, launchers, --config-dir, --cfg job.

    python -m megatron_mosaic.search -m cluster=h100_8x8,a800_8x8 search.max_tp=2,4,8
    python -m megatron_mosaic.search -m hydra/launcher=submitit_slurm ...      each point a job of Slurm

Every point writes plan.yaml and result.json into its directory, and returns its step in seconds, for sweepers that
minimise; a point without a feasible plan, or with wrong input, is `inf`. After a sweep there are sweep.csv and, with
matplotlib, sweep.png. Without one, wrong input ends with status 2, and no feasible plan with 1.

Hydra adds keys that no file has only where a `+` says so: +search.pin.llm.layout.tp=8 +search.pin.schedule=1f1b
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from megatron_mosaic.config import build_task, validate_sections
from megatron_mosaic.errors import MosaicError
from megatron_mosaic.plan.plan_file import save_plan
from megatron_mosaic.search.find import find_plan
from megatron_mosaic.search.sweep import RESULT_FILE


@hydra.main(config_path="pkg://megatron_mosaic.conf", config_name="app", version_base="1.3")
def main(cfg: DictConfig) -> float:
    """Seconds of a step of the best plan."""
    job = HydraConfig.get()
    directory = Path(job.runtime.output_dir)
    row: dict[str, Any] = {"overrides": list(job.overrides.task)}
    try:
        task = build_task(validate_sections(OmegaConf.to_container(cfg, resolve=True)))
        found = find_plan(task.cost_model(), task.search)
        save_plan(task.complete(found.plan), directory / "plan.yaml")
        row |= {
            "step_s": found.simulation.step_s,
            "samples_per_s": found.simulation.price.work.num_samples / found.simulation.step_s,
            "peak_bytes": found.simulation.peak_bytes,
            "search_s": found.search_s,
            "error": "",
        }
        status = 0
    except MosaicError as error:
        status = 1 if getattr(error, "is_answer", False) else 2
        row |= {"step_s": math.inf, "error": " ".join(str(error).split())}
    (directory / RESULT_FILE).write_text(json.dumps(row) + "\n", encoding="utf-8")
    print(
        row["error"] or f"step {row['step_s']:.6g} s, peak {row['peak_bytes'] / 1e9:.4g} GB: {directory / 'plan.yaml'}"
    )
    if status and job.mode is RunMode.RUN:
        sys.exit(status)
    return float(row["step_s"])


if __name__ == "__main__":
    main()
