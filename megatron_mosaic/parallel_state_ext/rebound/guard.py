"""Raises where a module's code reads Megatron's global `parallel_state`, instead of letting it use what it finds.

The global groups are never initialised under a plan. Most accessors then assert, which names no module; those in
SILENT answer None, 0, 1 or False, which upstream takes for "not parallel", and a group of None is the whole world to
torch. With the guard every read is an error that names module, accessor and caller, unless it stands in TOLERATED.

Off, nothing is replaced. On, each accessor is replaced wherever a Python module holds it, and put back by `remove`.
"""

from __future__ import annotations

import functools
import inspect
import os
import sys
from collections.abc import Callable, Collection, Mapping
from types import FrameType, FunctionType, ModuleType
from typing import Any

from megatron.core import parallel_state
from megatron.core import utils as megatron_utils

from megatron_mosaic.errors import GroupError

VARIABLE = "MOSAIC_GUARD"

# Takes a group and returns it, but for None: then the ambient group if there is one, and None, the world, if not.
_GROUP_OR_AMBIENT = "get_tensor_model_parallel_group_if_none"

# Accessors that answer although no global group exists: what they answer. A test compares this with Megatron.
SILENT: dict[str, Any] = {
    "get_expert_gtp_weight_remat_rank": 0,
    "get_expert_gtp_weight_remat_world_size": 0,
    "get_expert_tensor_parallel_rank": None,
    "get_expert_tensor_parallel_world_size": None,
    "get_gtp_weight_remat_rank": 0,
    "get_gtp_weight_remat_world_size": 0,
    "get_virtual_pipeline_model_parallel_rank": None,
    "get_virtual_pipeline_model_parallel_world_size": None,
    "is_initialized": False,
    "is_rank_in_embedding_group": False,
    "is_rank_in_position_embedding_group": False,
    "model_parallel_is_initialized": False,
}  # and, with check_initialized=False, None: every accessor of a group that has this parameter

# Readers of Megatron that are let through: (caller, accessor) -> why the answer without global groups is harmless.
# A test fails when a reader is not listed, and when an entry is no longer hit.
_COLLECTION = "megatron.core.process_groups_config:ProcessGroupCollection.use_mpu_process_groups"
_NO_GTP = "weights rematerialised over gtp ranks: no plan has such an axis, and None says so"
TOLERATED: dict[tuple[str, str], str] = {
    (_COLLECTION, "get_gtp_weight_remat_group"): _NO_GTP,
    (_COLLECTION, "get_expert_gtp_weight_remat_group"): _NO_GTP,
    ("megatron.core.tensor_parallel.layers:RowParallelLinear._forward_impl", _GROUP_OR_AMBIENT): (
        "leaves the group out of a product whose collectives it switches off"
    ),
}

_NOT_STATE = {
    "get_nccl_options",  # of its arguments only
    "get_global_memory_buffer",  # scratch memory, of the module that asks: holds nothing between two calls
}


class Guard:
    """Replaces the accessors between `install` and `remove`; `tolerated` counts the reads that were let through."""

    def __init__(self, active: Callable[[], str | None]) -> None:
        """`active()`: the module whose code runs, None between modules (nothing is refused there)."""
        self._active = active
        self._replaced: dict[int, Any] = {}  # id of an object -> what stands in its place
        self._originals: dict[int, Any] = {}
        self.tolerated: dict[tuple[str, str], int] = {}

    def install(self) -> Guard:
        """The guard itself, which judges every read from now on."""
        assert not self._replaced, "the guard is installed already"
        for name, function in accessors().items():
            self._pair(function, self._guarded(name, function))
        helper = getattr(megatron_utils, _GROUP_OR_AMBIENT)
        self._pair(helper, self._guarded_helper(helper))
        _HOLDERS.replace(self._replaced)
        return self

    def remove(self) -> None:
        """Put every accessor back, also where a module has imported it in the meantime."""
        _HOLDERS.replace(self._originals)
        self._replaced, self._originals = {}, {}

    def _pair(self, original: FunctionType, guarded: Callable[..., Any]) -> None:
        self._replaced[id(original)] = guarded
        self._originals[id(guarded)] = original

    def _guarded(self, name: str, original: FunctionType) -> Callable[..., Any]:
        @functools.wraps(original)
        def read(*args: Any, **kwargs: Any) -> Any:
            self._judge(name, sys._getframe(1))
            return original(*args, **kwargs)

        return read

    def _guarded_helper(self, original: FunctionType) -> Callable[..., Any]:
        """A given group is returned without a look at the global ones; for None the caller of the caller is judged."""

        @functools.wraps(original)
        def read(tp_group: Any, *args: Any, **kwargs: Any) -> Any:
            if self._active() is not None:
                if tp_group is None:
                    self._judge(_GROUP_OR_AMBIENT, sys._getframe(2))  # who left the argument out?
                return tp_group
            return original(tp_group, *args, **kwargs)

        return read

    def _judge(self, accessor: str, caller: FrameType) -> None:
        module = self._active()
        name = caller.f_globals.get("__name__", "?")
        if module is None or name == parallel_state.__name__:
            return  # between modules; or one accessor asks another, and the first has been judged
        key = (f"{name}:{caller.f_code.co_qualname}", accessor)
        if key in TOLERATED:
            self.tolerated[key] = self.tolerated.get(key, 0) + 1
            return
        place = f"{caller.f_code.co_filename}:{caller.f_code.co_qualname}:{caller.f_lineno}"
        answer = f", which would have answered {SILENT[accessor]!r}" if accessor in SILENT else ""
        raise GroupError(
            f"module {module}",
            got=f"{accessor}() of Megatron's global parallel_state{answer}, called by {place}",
            expected="groups as arguments: under a plan the global ones belong to no module",
            fix="pass the module's pg_collection, or the group itself, there"
            + (f"; if the read is harmless, add {key} to guard.TOLERATED" if name.startswith("megatron.") else ""),
        )


def is_wanted() -> bool:
    """Whether the environment asks for the guard."""
    return os.environ.get(VARIABLE, "") not in ("", "0")


def accessors() -> Mapping[str, FunctionType]:
    """Every public function of parallel_state that tells a group, rank, size, rank list, or whether there are any."""
    return {
        name: function
        for name, function in vars(parallel_state).items()
        if inspect.isfunction(function)
        and function.__module__ == parallel_state.__name__
        and (name.startswith(("get_", "is_")) or name == "model_parallel_is_initialized")
        and name not in _NOT_STATE
    }


class _Holders:
    """Which modules hold an accessor under which name. Each module is looked at once: forked ranks inherit the list."""

    def __init__(self) -> None:
        self._seen: set[str] = set()
        self._found: list[tuple[ModuleType, str]] = []

    def look(self, wanted: Collection[int]) -> None:
        """Note who holds objects of these ids, among the modules that were loaded since the last look."""
        fresh = sys.modules.keys() - self._seen
        self._seen |= fresh
        for module in filter(None, map(sys.modules.get, fresh)):
            held = getattr(module, "__dict__", {})  # anything may stand in sys.modules
            self._found += [(module, name) for name, value in held.items() if id(value) in wanted]

    def replace(self, by_id: Mapping[int, Any]) -> None:
        """Wherever a loaded module holds one of these objects under any name, put the other in its place."""
        self.look(by_id.keys())
        for module, name in self._found:
            value = module.__dict__.get(name)
            if id(value) in by_id:
                setattr(module, name, by_id[id(value)])


_HOLDERS = _Holders()


def find_holders() -> None:
    """Look for accessors in all modules loaded so far, for ranks that are forked later."""
    _HOLDERS.look({id(function) for function in (*accessors().values(), getattr(megatron_utils, _GROUP_OR_AMBIENT))})
