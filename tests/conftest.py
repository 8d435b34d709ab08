"""Settings of all tests."""

import os
import sys

import pytest
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


@pytest.fixture(autouse=True, scope="module")
def scratch_memory_as_before():
    """Tests of one module leave no Megatron memory buffer to ranks that those of another fork from this process."""
    yield
    state = sys.modules.get("megatron.core.parallel_state")
    if state is not None:
        state._GLOBAL_MEMORY_BUFFER = None
