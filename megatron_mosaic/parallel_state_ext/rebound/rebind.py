"""Which Megatron this code knows, and the only place that replaces names inside it.

Official seams come first (`pg_collection=`, `skip_model_parallel_init=`, `cfg_container.model`). What has none is
rebound here by exact qualified name, and a name that is gone is an error, never a silent no-op.
"""

from __future__ import annotations

import inspect
import pkgutil
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

from packaging.version import Version

from megatron_mosaic.errors import VersionError

SUPPORTED = ("0.19.2", "0.20")  # megatron-core: from (inclusive), to (exclusive)


def require_supported_megatron() -> str:
    """The installed megatron-core version. VersionError if it is not one this code knows."""
    installed = version("megatron-core")
    low, high = (Version(bound).release for bound in SUPPORTED)
    if not low <= Version(installed).release < high:  # a release candidate counts as its release
        raise VersionError(
            "megatron-core",
            got=installed,
            expected=f">= {SUPPORTED[0]}, < {SUPPORTED[1]}",
            fix=f"pip install 'megatron-core>={SUPPORTED[0]},<{SUPPORTED[1]}'",
        )
    return installed


def rebind(qualified_name: str, replacement: Any, *, must_accept: tuple[str, ...] = ()) -> Any:
    """Put `replacement` in the place of `package.module.name`, or of a class's method, and return what stood there.

    `must_accept` names parameters that the original has to have, so that a changed signature is found here and not
    in the middle of a training step.
    """
    owner_name, _, name = qualified_name.rpartition(".")
    owner = pkgutil.resolve_name(owner_name)
    if not hasattr(owner, name):
        raise VersionError(
            qualified_name,
            got=f"no such name in megatron-core {version('megatron-core')}",
            expected="the name this code replaces",
            fix="use a supported megatron-core, or adapt parallel_state_ext/compat.py",
        )
    original = getattr(owner, name)
    if must_accept:
        missing = [key for key in must_accept if key not in inspect.signature(original).parameters]
        if missing:
            raise VersionError(
                qualified_name,
                got=f"no parameters {missing}",
                expected=f"a function that takes {list(must_accept)}",
                fix="use a supported megatron-core, or adapt parallel_state_ext/compat.py",
            )
    setattr(owner, name, replacement)
    return original


def rebind_training(
    *, get_megatron_optimizer: Callable[..., Any], get_forward_backward_func: Callable[..., Any]
) -> None:
    """Let `megatron.training.training` use our optimizer and our executor (no official seam in 0.19)."""
    rebind(
        "megatron.training.training.get_megatron_optimizer",
        get_megatron_optimizer,
        must_accept=("config", "model_chunks", "config_overrides"),
    )
    rebind(
        "megatron.training.training.get_forward_backward_func",
        get_forward_backward_func,
        must_accept=("schedule_pg_collection",),
    )
