#!/usr/bin/env bash
# What one GPU can answer, in stages of under 9 minutes each, most important first. Each stage writes its results as it
# goes; a stage that fails does not stop the next. No network, no set-up: torch and cuda-bindings as found.
#
#   PY=python3 bash scripts/gpu_checks.sh OUT [WHEELS]        all stages but type
#   GPU_TYPE=h100-sxm bash scripts/gpu_checks.sh OUT          type, too: the name that its constants get
#   STAGES="smid pairs" bash scripts/gpu_checks.sh OUT        some of them
#
# WHEELS: a folder of wheels for packages that are missing (megatron-core and what it needs); installed without network.
#
#   smid      lanes have SMs of their own, backward stays in its lane        the proof of disjointness
#   pairs     scripts/bench_colocation.py: turns, streams, all quota pairs   does sharing gain? gradients equal?
#   tests     pytest -m gpu
#   type      mosaic calibrate --gpu-type "$GPU_TYPE"                        constants of this GPU; only if GPU_TYPE is set
#   train     the reference model on one rank under `overlap`: in turns, on streams, on green contexts; NCCL alone
set -u
PY=${PY:-python3}
OUT=${1:?usage: gpu_checks.sh OUT [WHEELS]}
WHEELS=${2:-}
GPU_TYPE=${GPU_TYPE:-}
STAGES=${STAGES:-"smid pairs train tests${GPU_TYPE:+ type}"}
LIMIT_S=${LIMIT_S:-530}

cd "$(dirname "$0")/.." || exit 2
mkdir -p "$OUT" || exit 2
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-32}
export CUBLAS_WORKSPACE_CONFIG=${CUBLAS_WORKSPACE_CONFIG:-:4096:8}

"$PY" -c 'import torch; assert torch.cuda.is_available()' 2>/dev/null || {
    echo "gpu_checks: $PY finds no GPU that torch can use" >&2
    exit 2
}
if [ -n "$WHEELS" ]; then
    "$PY" -m pip install --quiet --no-index --no-deps --target "$OUT/packages" "$WHEELS"/*.whl || exit 2
    export PYTHONPATH="$PYTHONPATH:$OUT/packages"
fi
"$PY" - >"$OUT/machine.json" <<'PYTHON'
import datetime, json, torch
from importlib.metadata import version
device = torch.cuda.get_device_properties(0)
print(json.dumps({
    "date": datetime.date.today().isoformat(), "gpu": device.name, "sms": device.multi_processor_count,
    "capability": [device.major, device.minor], "memory_bytes": device.total_memory,
    "torch": torch.__version__, "cuda": torch.version.cuda, "cuda_bindings": version("cuda-bindings"),
}))
PYTHON

cat >"$OUT/plan.yaml" <<'YAML'
mosaic_plan: 1
workload: any2any-digits
world_size: 1
global_batch_size: 8
micro_batch_size: 2
schedule: overlap
modules:
  vision: {ranks: '0', layout: {dp: 1}, quota: 0.33}
  llm: {ranks: '0', layout: {dp: 1}, quota: 0.67}
  generator: {ranks: '0', layout: {dp: 1}}
YAML

run_stage() {
    case "$1" in
    smid) "$PY" scripts/gpu_smid.py --out "$OUT/smid.jsonl" ;;
    pairs) "$PY" scripts/bench_colocation.py --out "$OUT/pairs.jsonl" --json >"$OUT/pairs.json" ;;
    tests) "$PY" -m pytest -q -m gpu tests ;;
    type) "$PY" -m megatron_mosaic.cli calibrate --gpu-type "${GPU_TYPE:?set GPU_TYPE, e.g. h100-sxm}" \
        --out "$OUT/gpu.yaml" --json >"$OUT/gpu.json" ;;
    train)
        for backend in none streams green_context; do
            "$PY" -m megatron_mosaic.cli train "$OUT/plan.yaml" --train-iters 20 --mosaic-quota-backend "$backend" --json \
                >"$OUT/train-$backend.json" || return 1
        done
        ;;
    *)
        echo "gpu_checks: no stage $1" >&2
        return 2
        ;;
    esac
}

export -f run_stage
export PY OUT GPU_TYPE
failed=0
for stage in $STAGES; do
    started=$SECONDS
    timeout "$LIMIT_S" bash -c "run_stage $stage" >"$OUT/$stage.log" 2>&1
    code=$?
    [ "$code" -eq 0 ] || failed=1
    printf '{"stage": "%s", "exit": %d, "seconds": %d}\n' "$stage" "$code" "$((SECONDS - started))" | tee -a "$OUT/stages.jsonl"
done
exit "$failed"
