#!/usr/bin/env bash
# Megatron-LM's pretrain_vlm.py, as it is, under a plan of two modules: checked against itself on one process, then
# trained. MEGATRON_LM: a checkout of core_v0.19.x.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
script="${MEGATRON_LM:?a checkout of Megatron-LM, core_v0.19.x}/pretrain_vlm.py"
plan="$here/plans/llava.yaml"
sizes=(
    --encoder-num-layers 2 --decoder-num-layers 4 --hidden-size 32 --num-attention-heads 4
    --seq-length 40 --max-position-embeddings 64 --img-h 28 --img-w 28 --patch-dim 14
    --tokenizer-type NullTokenizer --vocab-size 127 --split 949,50,1 --lr 1e-3
)

mosaic check "$plan" --script "$script" "${sizes[@]}"
torchrun --nproc-per-node 2 -m megatron_mosaic.run "$script" "${sizes[@]}" --train-iters 4 --eval-interval 4 --eval-iters 1 \
    --mosaic-plan "$plan"
