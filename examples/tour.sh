#!/usr/bin/env bash
# A tour of the planner on one node of 8 H100: no GPU, no torch, less than a minute. Files go to the current folder.
set -euo pipefail
say() { printf '\n# %s\n' "$*"; }

say "A plan: which ranks, degrees and schedule each module has. The moves are what the search did, and what each gained."
mosaic plan model=vlm_7b cluster=h100_1x8 search.max_tp=2 --out tour.yaml

say "The same plan as tables: modules, ranks, memory, and the order of the step."
mosaic show tour.yaml

say "One step of it on the simulator: a row a lane, F forward, B backward, a dot where nothing runs."
mosaic simulate tour.yaml --trace tour.json

say "The file is yours to edit. Here the encoder takes two ranks away from the backbone ..."
cat >tour_split.yaml <<'PLAN'
mosaic_plan: 1
workload: vlm_7b
world_size: 8
global_batch_size: 512
micro_batch_size: 1
cluster: h100_1x8
training: {format: bf16}
schedule: 1f1b
modules:
  vision: {ranks: 6-7, layout: {dp: 2}}
  llm:    {ranks: 0-5, layout: {tp: 1, pp: 2, dp: 3}}
PLAN
say "... which this batch cannot be cut for. A refusal says where, what, what instead and how:"
mosaic simulate tour_split.yaml || echo "(exit status $?)"

say "With a batch that three replicas can share it can; does it fit, and is it faster?"
sed -i 's/global_batch_size: 512/global_batch_size: 510/' tour_split.yaml
mosaic simulate tour_split.yaml | tail -n 20 || echo "(exit status 1: a rank needs more memory than it has)"

say "All of it as one page: open tour.html in a browser."
mosaic report tour.yaml --no-search --out tour.html
