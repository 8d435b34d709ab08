"""Judges arguments by their values: no argument is ignored in silence."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from enum import Enum, StrEnum
from typing import Any

from megatron_mosaic.errors import ConfigError
from megatron_mosaic.plan import Plan
from megatron_mosaic.plan.workload import Workload
from megatron_mosaic.runtime.flags.command_line import GIVES_WAY, CommandLine
from megatron_mosaic.runtime.flags.table import Argument, Verdict, arguments_by_dest


class Purpose(StrEnum):
    """What a command line is for: a check needs an oracle for all that is set."""

    train = "train"
    check = "check"


def decided_by(plan: Plan, backbone: str) -> dict[str, Any]:
    """Arguments that the plan decides and that Megatron's loop reads, by dest."""
    layout = plan.modules[backbone].layout
    return {
        "tensor_model_parallel_size": layout.tp,
        "context_parallel_size": layout.cp,
        "pipeline_model_parallel_size": layout.pp,
        "micro_batch_size": plan.micro_batch_size,
        "global_batch_size": plan.global_batch_size,
    }


def facts_of(workload: Workload) -> frozenset[str]:
    """What rows of the table may need beside other arguments: `experts` in some module."""
    return frozenset({"experts"} if any(module.num_experts for module in workload.modules) else ())


def judge(
    line: CommandLine,
    *,
    purpose: Purpose = Purpose.train,
    decided: Mapping[str, Any] | None = None,
    facts: Collection[str] = (),
) -> tuple[str, ...]:
    """A sentence for each argument that is set and has no effect here. ConfigError for the first that is refused.

    `decided`: what the plan says, by dest. `facts`: what rows may need beside other arguments.
    """
    _refuse_pairs(line)
    decided = decided or {}
    values = {**vars(line.values), **decided}
    notes = []
    rows = arguments_by_dest()
    for dest, value in line.typed.items():
        if dest not in rows or _same(value, line.defaults[dest]):
            continue  # an argument of the script itself; or what holds anyway
        argument = rows[dest]
        if dest in decided:
            _require_agreement(argument, value, decided[dest])
        elif argument.verdict is Verdict.irrelevant:
            notes.append(f"{argument.flag} has no effect here: {argument.reason}")
        elif argument.verdict is not Verdict.honoured or not _is_among(value, argument.only):
            raise _refusal(argument, value, line.defaults[dest])
        _require_needs(argument, values, facts)
        if purpose is Purpose.check:
            _require_oracle(argument, value, line.defaults[dest])
    return tuple(notes)


def _refuse_pairs(line: CommandLine) -> None:
    for theirs, ours in GIVES_WAY:
        if line.typed.get(theirs) and line.typed.get(ours) is not None:
            flags = [arguments_by_dest()[dest].flag for dest in (theirs, ours)]
            raise ConfigError(
                flags[0], got=" with ".join(flags), expected="one of the two", fix=f"leave {flags[0]} or {flags[1]} out"
            )


def _require_agreement(argument: Argument, value: Any, decided: Any) -> None:
    if value != decided:
        raise ConfigError(
            argument.flag,
            got=value,
            expected=f"{decided}, as in the plan",
            fix="leave the argument out: the plan decides",
        )


def _refusal(argument: Argument, value: Any, default: Any) -> ConfigError:
    fix = f"leave {argument.flag} out"
    if argument.verdict is Verdict.plan:
        return ConfigError(
            argument.flag,
            got=_shown(value),
            expected=f"what the plan decides: {argument.reason}",
            fix=f"{fix}, and say it in the plan",
        )
    expected = f"one of {', '.join(argument.only)}" if argument.only else _default_of(argument, default)
    return ConfigError(argument.flag, got=_shown(value), expected=f"{expected}: {argument.reason}", fix=fix)


def _require_needs(argument: Argument, values: Mapping[str, Any], facts: Collection[str]) -> None:
    if argument.needs and not any(_holds(need, values, facts) for need in argument.needs):
        needed = " or ".join(_as_words(need) for need in argument.needs)
        raise ConfigError(
            argument.flag,
            got=f"{argument.flag} without {needed}",
            expected=f"{needed} beside it: else it has no effect",
            fix=f"add {needed}, or leave {argument.flag} out",
        )


def _require_oracle(argument: Argument, value: Any, default: Any) -> None:
    """Refuse what the reference of a check cannot compute, or not twice alike."""
    if argument.check and not (argument.check_only and _is_among(value, argument.check_only)):
        raise ConfigError(
            argument.flag,
            got=_shown(value),
            expected=f"{_default_of(argument, default)} in a check: {argument.check}",
            fix=f"leave {argument.flag} out of the check",
        )


def _holds(need: str, values: Mapping[str, Any], facts: Collection[str]) -> bool:
    dest, _, wanted = need.partition("=")
    if dest not in values:
        return need in facts
    return str(_plain(values[dest])) == wanted if wanted else bool(values[dest])


def _as_words(need: str) -> str:
    dest, _, wanted = need.partition("=")
    argument = arguments_by_dest().get(dest)
    if argument is None:
        return f"a module with {need}"
    return f"{argument.flag} {wanted}".strip() if argument.takes_value else argument.flag


def _same(value: Any, default: Any) -> bool:
    return _plain(value) == _plain(default) or value == [default]


def _plain(value: Any) -> Any:
    """Members of Megatron's enums by name, as they are typed."""
    return value.name if isinstance(value, Enum) and not isinstance(value, str) else value


def _is_among(value: Any, names: Collection[str]) -> bool:
    return not names or str(_plain(value)) in names


def _shown(value: Any) -> Any:
    return "set" if isinstance(value, bool) else _plain(value)


def _default_of(argument: Argument, default: Any) -> str:
    return "not set" if not argument.takes_value or default is None else str(_plain(default))
