"""A gap of Megatron's distributed optimizer to close: torch's own Adam."""

from __future__ import annotations

import functools
from typing import Any

from megatron.core.optimizer import distrib_optimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer


def accept_torch_adam() -> None:
    """Let the distributed optimizer save and load with torch's own Adam. Idempotent; nothing with Apex or TE.

    torch's Adam keeps `step` among its state tensors, the others do not. Megatron's loader asks the checkpoint for
    every state tensor it finds and fails on `step`, which it has set from the parameter groups already: to one tensor,
    shared by all parameters, that each of them would then count up. And where no step has been made, or a rank holds
    no part of any parameter, it finds no step to save.
    """
    if distrib_optimizer.HAVE_APEX_OR_TE or hasattr(DistributedOptimizer.state_dict, "__wrapped__"):
        return
    stock_set, stock_dict = DistributedOptimizer._set_main_param_and_optimizer_states, DistributedOptimizer.state_dict
    stock_load = DistributedOptimizer.load_state_dict

    @functools.wraps(stock_set)
    def set_states(self: DistributedOptimizer, model_param: Any, tensors: dict[str, Any]) -> None:
        group, order = self.model_param_group_index_map[model_param]
        state = self.optimizer.state[self.optimizer.param_groups[group]["params"][order]]
        stock_set(self, model_param, {"step": state["step"], **tensors})

    @functools.wraps(stock_dict)
    def state_dict(self: DistributedOptimizer) -> dict[str, Any]:
        if self.optimizer.state:
            return stock_dict(self)  # type: ignore[no-any-return]
        groups = self.optimizer.state_dict()["param_groups"]
        named = [{k: v for k, v in group.items() if k != "params"} | {"step": 0.0} for group in groups]
        return {"optimizer": {"param_groups": named}}

    @functools.wraps(stock_load)
    def load_state_dict(self: DistributedOptimizer, state_dict: dict[str, Any]) -> None:
        stock_load(self, state_dict)
        for state in self.optimizer.state.values():
            state["step"] = state["step"].clone()

    DistributedOptimizer._set_main_param_and_optimizer_states = set_states
    DistributedOptimizer.load_state_dict = load_state_dict
    DistributedOptimizer.state_dict = state_dict
