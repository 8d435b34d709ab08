"""What a run was predicted to be, as a file: commands write it, ranks lay it beside what they measure.

{"step_s": 1.2, "lane_s": {"vision.0": 0.3, ...}, "step_flops": 1e15, "peak_flops_per_s": 8e15, "source": "..."}
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError

from megatron_mosaic.errors import ConfigError
from megatron_mosaic.plan.yaml_text import MAX_SECONDS, Schema, describe_violation
from megatron_mosaic.text_file import FileKind, read_text_file, show_path

PREDICTED_FILE = "predicted.json"
_FIX = "make it again: `mosaic plan` with --predicted FILE"
_KIND = FileKind(what="a prediction as `mosaic plan --predicted` writes it", error=ConfigError, fix=_FIX)
_Seconds = Annotated[float, Field(ge=0, le=MAX_SECONDS)]


class Prediction(Schema):
    """One step. `lane_s`: seconds of a lane's spans, mean over its ranks. `step_flops`: model FLOPs of all modules.

    `peak_flops_per_s`: of all ranks' devices together, from the datasheet; of CPUs, what a large product was measured
    to reach.
    """

    step_s: Annotated[float, Field(gt=0, le=MAX_SECONDS)]
    lane_s: Mapping[str, _Seconds]
    step_flops: Annotated[float, Field(gt=0)]
    peak_flops_per_s: Annotated[float, Field(gt=0)]
    source: str

    def mfu_frac(self, step_s: float) -> float:
        """Of a step that took so long."""
        return self.step_flops / (step_s * self.peak_flops_per_s)


def format_prediction(prediction: Prediction) -> str:
    """The file's text."""
    return json.dumps(prediction.model_dump(mode="json"), indent=1) + "\n"


def load_prediction(path: str | Path, lanes: Collection[str]) -> Prediction:
    """ConfigError names file and key, or says that it is of a plan with other lanes."""
    where = show_path(path)
    try:
        data: Any = json.loads(read_text_file(path, _KIND))
        found = Prediction.model_validate(data)
    except json.JSONDecodeError as error:
        raise ConfigError(where, got=str(error), expected=_KIND.what, fix=_FIX) from error
    except ValidationError as error:
        raise ConfigError(**describe_violation(error, where=f"{where}: ", known="a key of a prediction")) from error
    predicted = {lane for lane in found.lane_s if not lane.startswith("~")}
    if predicted != set(lanes):
        odd = sorted(predicted ^ set(lanes))[:4]
        raise ConfigError(where, got=f"another plan's lanes: {', '.join(odd)}", expected="this plan's", fix=_FIX)
    return found
