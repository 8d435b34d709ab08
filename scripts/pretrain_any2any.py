"""Pretrain the reference model (vision, llm, generator) under a plan: see megatron_mosaic/any2any/pretrain.py.

torchrun --nproc-per-node 4 scripts/pretrain_any2any.py --mosaic-plan plan.yaml --train-iters 60
"""

import sys

from megatron_mosaic.any2any.pretrain import main

if __name__ == "__main__":
    sys.exit(main())
