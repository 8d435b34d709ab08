"""Settings of all tests."""

import os

from hypothesis import settings

# Before torch is imported: a rank forked from a process that has used several OpenMP threads hangs in its first loop.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Ranks refuse reads of Megatron's global groups by a module's code: --mosaic-guard.
os.environ.setdefault("MOSAIC_GUARD", "1")

# Times of a busy machine are no property of the code. The same examples in every run: MOSAIC_RANDOM=1 draws new ones.
settings.register_profile(
    "mosaic", deadline=None, max_examples=60, derandomize=not os.environ.get("MOSAIC_RANDOM"), database=None
)
settings.load_profile("mosaic")
