#!/usr/bin/env bash
# A plan for Qwen2-VL-72B on 64 nodes of 8 H100, in seconds on a laptop: no GPU, no torch. Files go to the current folder.
set -euo pipefail
# Of a step: the optimizer's state is sharded, and 90 % of the backward hides the gradients' traffic.
training=(workload.training.sharding=optimizer workload.training.gradient_overlap_frac=0.9)

mosaic plan model=qwen2_vl_72b cluster=h100_64x8 "${training[@]}" --out plan_72b.yaml
mosaic show plan_72b.yaml
mosaic report plan_72b.yaml --no-search --out plan_72b.html # without --no-search: the plans that a search finds around it
