#!/usr/bin/env bash
# The main job on this machine (CPU, gloo, 4 ranks): set-up, calibrate, plan, show, train 60 steps through Megatron's
# own pretrain(), and the predicted beside the measured timeline.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash scripts/setup.sh
started=$SECONDS
export OMP_NUM_THREADS=1
out=outputs/quickstart
mkdir -p "$out"
export MOSAIC_PROFILE=$out/profile.yaml

step() { printf '\n== %s  (%d s)\n' "$1" $((SECONDS - started)); }

step "calibrate: measure this machine"
.venv/bin/mosaic calibrate --out "$MOSAIC_PROFILE"

step "plan: search layouts, ranks and micro-batch size for 4 ranks"
.venv/bin/mosaic plan model=any2any-digits cluster=local cluster.num_ranks=4 --out "$out/plan.yaml"

step "show: the plan"
.venv/bin/mosaic show "$out/plan.yaml"

step "train: 60 steps with 4 processes; Megatron's log goes to $out/train.log"
.venv/bin/mosaic train "$out/plan.yaml" --log "$out/train.log" --trace "$out/trace.json" --train-iters 60 --eval-iters 1

step "done"
echo "plan      $out/plan.yaml"
echo "profile   $out/profile.yaml"
echo "timeline  $out/trace.json (open it in Perfetto)"
