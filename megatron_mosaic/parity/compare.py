"""Lays what the ranks wrote down beside what the reference did."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path

import numpy as np

from megatron_mosaic.errors import ConfigError
from megatron_mosaic.parity.reference_files import ReferenceStep, load_parameters
from megatron_mosaic.parity.verdict import MOST_EXCUSED, Parity, gradient_error, norm, ratio
from megatron_mosaic.plan import Plan
from megatron_mosaic.runtime.dumps.reader import read_gradients, read_parameters
from megatron_mosaic.runtime.telemetry.step_report import LOSSES_FILE, MEASURES_FILE


def compare(plan: Plan, steps: int, directory: Path) -> Parity:
    """The verdict on a run of the plan and one of the reference that wrote into the directory."""
    losses = [json.loads(line) for line in (directory / LOSSES_FILE).read_text().splitlines()]
    if len(losses) != steps:
        raise ConfigError("check", got=f"{len(losses)} steps", expected=f"{steps} steps", fix="report this")
    gradients, loss_errors, unrepeatable = _Gradients(plan.modules), [], []
    for step, ours in enumerate(losses):
        reference = ReferenceStep.load(directory, step)  # one at a time: each holds all gradients
        gradients.add(step, reference, read_gradients(directory, step))
        loss_errors += [ratio(abs(ours[name] - value), abs(value)) for name, value in reference.losses.items()]
        unrepeatable.append(reference.unrepeatable)
    parameters, worst_replica = _compare_parameters(plan.modules, directory, gradients.excused)
    measures = json.loads((directory / MEASURES_FILE).read_text())
    return Parity(
        steps=steps,
        loss_rel_err=max(loss_errors),
        grad_rel_err_by_module=gradients.by_module,
        worst_parameter=gradients.worst,
        ill_conditioned=gradients.ill_conditioned,
        wholly_excused_modules=tuple(sorted(gradients.wholly_excused)),
        unexercised_modules=tuple(sorted(gradients.trained - gradients.exercised)),
        unrepeatable=_in_steps(unrepeatable),
        parameter_rel_err_by_module=parameters,
        worst_replica=worst_replica,
        peak_activation_bytes_by_module=measures["peak_activation_bytes_by_module"],
        empty_units_by_module=measures["empty_units_by_module"],
        imbalance_by_owner=measures["imbalance_by_owner"],
        imbalance_by_module=measures["imbalance_by_module"],
    )


class _Gradients:
    """What the gradients of the steps so far say. `trained`: modules that have one; `exercised`: one that is not 0."""

    def __init__(self, modules: Collection[str]) -> None:
        self._modules = tuple(modules)
        self._errors: dict[str, float] = {}  # by "module/parameter in step N"
        self.ill_conditioned: dict[str, float] = {}
        self.excused: set[str] = set()  # the parameters of those
        self.trained: set[str] = set()
        self.exercised: set[str] = set()
        self.wholly_excused: set[str] = set()

    @property
    def by_module(self) -> dict[str, float]:
        """Largest error of each module that is not excused."""
        found = dict.fromkeys(self._modules, 0.0)
        for name, error in self._errors.items():
            found[_module(name)] = max(found[_module(name)], error)
        return found

    @property
    def worst(self) -> str:
        """Whose error is the largest of all; empty where there is none."""
        name, error = max(self._errors.items(), key=lambda pair: pair[1], default=("", 0.0))
        return name if error else ""

    def add(self, step: int, expected: ReferenceStep, ours: dict[str, np.ndarray]) -> None:
        """The gradients of one step."""
        _require_same_names(expected.gradients.keys(), ours.keys())
        judged, excused = set(), set()  # modules with a gradient that counts, and that does not
        for name, gradient in expected.gradients.items():
            self.trained.add(_module(name))
            relative, is_rounding = gradient_error(ours[name], gradient, expected.rounding.get(name, 0.0))
            if is_rounding:
                self.ill_conditioned[_in_step(name, step)] = relative
                self.excused.add(name)
                excused.add(_module(name))
            else:
                self._errors[_in_step(name, step)] = relative
                if gradient.any():
                    judged.add(_module(name))
        self.exercised.update(judged | excused)
        self.wholly_excused.update(excused - judged)


def _compare_parameters(
    modules: Collection[str], directory: Path, excused: Collection[str]
) -> tuple[dict[str, float], str]:
    """(largest error of a module's parameters, over all ranks; whose is the largest of all).

    Left out: up to MOST_EXCUSED, those whose gradient was `excused`.
    """
    expected = load_parameters(directory)
    sizes = {name: norm(array) for name, array in expected.items()}
    by_module, worst, found = dict.fromkeys(modules, 0.0), ("", 0.0), set()
    for rank, place, values in read_parameters(directory):
        found.add(place.name)
        if place.name not in expected:
            continue
        error = ratio(norm(values - place.of(expected[place.name], len(values))), sizes[place.name])
        if place.name in excused and error <= MOST_EXCUSED:
            continue
        by_module[_module(place.name)] = max(by_module[_module(place.name)], error)
        worst = max(worst, (f"{place.name} on rank {rank}", error), key=lambda pair: pair[1])
    _require_same_names(expected.keys(), found)
    return by_module, worst[0]


def _require_same_names(expected: Collection[str], ours: Collection[str]) -> None:
    if differing := sorted({*expected} ^ {*ours}):
        some = f"{len(differing)} parameters on one side only, e.g. {differing[0]}"
        raise ConfigError("check", got=some, expected="the reference's parameters", fix="report this")


def _module(name: str) -> str:
    return name.partition("/")[0]


def _in_steps(errors: list[dict[str, float]]) -> dict[str, float]:
    return {_in_step(name, step): error for step, one in enumerate(errors) for name, error in one.items()}


def _in_step(name: str, step: int) -> str:
    return f"{name} in step {step}"
