"""What of an optimizer's state is no tensor, in a form that fits every layout; and a gap of Megatron's to close.

    saved under plan A: one record per module: {"groups": {identifier: values}, steps}
    loaded under plan B: each rank's own structure, its parameter groups looked up by identifier

A rank's structure depends on its layout (a stage may have no expert, no bias, no parameter); the record does not.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer.optimizer import param_group_identifier_keys

from megatron_mosaic.errors import ConfigError

Record = dict[str, Any]


def build_record(common: Any, module_group: dist.ProcessGroup) -> Record:
    """The module's parameter groups and step. Collective: called by every rank of the module.

    `common` is what remains of this rank's optimizer state once sharded tensors are taken out.
    """
    own = _empty_record()
    for state in _optimizer_states(common):
        for group in state["param_groups"]:
            own["groups"].setdefault(_identifier(group), {k: v for k, v in group.items() if k != "params"})
            own["group_step"] = _later(own["group_step"], group.get("step"))
        own["tensor_step"] = _later(own["tensor_step"], state.get("state", {}).get("common_step"))
    gathered: list[Record] = [{} for _ in range(module_group.size())]
    dist.all_gather_object(gathered, own, group=module_group)
    merged = _empty_record()
    for one in gathered:
        merged["groups"] = one["groups"] | merged["groups"]
        for kind in ("group_step", "tensor_step"):
            merged[kind] = _later(merged[kind], one[kind])
    return merged


def fill_from_record(common: Any, record: Record, module: str) -> Any:
    """This rank's structure with the saved values in it. ConfigError if a parameter group was never saved."""
    filled = copy.deepcopy(common)
    for state in _optimizer_states(filled):
        for group in state["param_groups"]:
            saved = record["groups"].get(_identifier(group))
            if saved is None:
                raise ConfigError(
                    f"optimizer state of module {module!r}",
                    got=f"no parameter group {_identifier(group)} in the checkpoint",
                    expected=f"one of {len(record['groups'])} saved groups to have these settings",
                    fix="start with the learning rates and weight decays of the saved run, or add --no-load-optim",
                )
            group.update(saved)
            if record["group_step"] is not None:
                group["step"] = record["group_step"]
        if record["tensor_step"] is not None:
            state.setdefault("state", {})["common_step"] = torch.tensor(record["tensor_step"])
    return filled


def _empty_record() -> Record:
    """Steps are counted in the parameter groups (distributed optimizer, Apex, TE) or beside each tensor (torch)."""
    return {"groups": {}, "group_step": None, "tensor_step": None}


def _optimizer_states(tree: Any) -> Iterator[dict[str, Any]]:
    """Every mapping with `param_groups`, however deep Megatron's chains and wrappers put it."""
    if isinstance(tree, Mapping):
        if "param_groups" in tree:
            yield tree  # type: ignore[misc]  # a dict: Megatron's state dicts are
        for value in tree.values():
            yield from _optimizer_states(value)
    elif isinstance(tree, list):
        for value in tree:
            yield from _optimizer_states(value)


def _identifier(group: Mapping[str, Any]) -> str:
    """What tells one parameter group from another: the keys that Megatron itself goes by."""
    return str([group.get(key, group.get(f"pre_{key}")) for key in param_group_identifier_keys])


def _later(a: Any, b: Any) -> float | None:
    """The larger of two step counts; a rank without parameters has none."""
    steps = [float(step) for step in (a, b) if step is not None]
    return max(steps) if steps else None
