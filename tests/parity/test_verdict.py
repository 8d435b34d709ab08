"""When a check passes: all agrees, and enough was compared. By hand, without a rank."""

from dataclasses import replace

import numpy as np
import pytest

from megatron_mosaic.errors import ConfigError
from megatron_mosaic.parity.compare import _compare_parameters, _Gradients
from megatron_mosaic.parity.reference_files import ReferenceStep, save_parameters
from megatron_mosaic.parity.verdict import MOST_EXCUSED, TOLERANCE, Parity
from megatron_mosaic.runtime.dumps.place import Place
from megatron_mosaic.runtime.parameters import Cut

ONE = np.array([1.0], dtype=np.float32)
SOUND = Parity(
    steps=1,
    loss_rel_err=1e-7,
    grad_rel_err_by_module={"vision": 1e-6, "llm": 0.0},
    worst_parameter="vision/w in step 0",
    ill_conditioned={},
    wholly_excused_modules=(),
    unexercised_modules=(),
    unrepeatable={},
    parameter_rel_err_by_module={"vision": 1e-6, "llm": 0.0},
    worst_replica="vision/w on rank 1",
    peak_activation_bytes_by_module={},
    empty_units_by_module={},
    imbalance_by_owner={},
    imbalance_by_module={},
)


def step_of(rounding=None, **gradients) -> ReferenceStep:
    """A reference's step with these gradients, `module/parameter` written `module_parameter`."""
    named = {name.replace("_", "/"): np.float32([value]) for name, value in gradients.items()}
    roundings = dict.fromkeys(named, rounding) if rounding else {}
    return ReferenceStep(losses={}, gradients=named, rounding=roundings, unrepeatable={})


def gradients_of(*steps) -> _Gradients:
    found = _Gradients(["a", "b"])
    for number, (expected, ours) in enumerate(steps):
        found.add(number, expected, {name.replace("_", "/"): np.float32([value]) for name, value in ours.items()})
    return found


@pytest.mark.parametrize(
    ("changes", "is_same", "ok", "words"),
    [
        ({}, True, True, ""),
        ({"loss_rel_err": 2e-5}, False, False, "worst gradient: vision/w in step 0"),
        ({"grad_rel_err_by_module": {"vision": 2e-5, "llm": 0.0}}, False, False, "worst gradient: vision/w in step 0"),
        ({"parameter_rel_err_by_module": {"vision": 2e-5, "llm": 0.0}}, False, False, "vision/w on rank 1"),
        ({"parameter_rel_err_by_module": {"vision": np.inf, "llm": 0.0}}, False, False, "vision/w on rank 1"),
        ({"unexercised_modules": ("llm",)}, True, False, "llm is trained, but no sample gave it a gradient"),
        ({"wholly_excused_modules": ("llm",)}, True, False, "of llm, nothing was left to compare"),
        ({"ill_conditioned": {"llm/r in step 0": 1e-4}}, True, True, "by rounding only: llm/r in step 0 (1.0e-04)"),
        ({"unrepeatable": {"llm/r in step 0": 0.7}}, True, True, "llm/r in step 0 differs by 7.0e-01"),
    ],
)
def test_what_decides(changes, is_same, ok, words) -> None:
    parity = replace(SOUND, **changes)
    assert (parity.is_same, parity.ok, parity.as_dict()["ok"]) == (is_same, ok, ok)
    assert words in "\n".join(parity.sentences) and bool(parity.sentences) == bool(words)


def test_an_excused_gradient_leaves_the_others_to_judge() -> None:
    found = gradients_of((step_of(1e-4, a_w=1.0, a_v=1.0, b_w=1.0), {"a_w": 1.0, "a_v": 1.0005, "b_w": 1.0}))
    assert found.ill_conditioned == {"a/v in step 0": pytest.approx(5e-4, rel=1e-3)}
    assert (found.wholly_excused, found.by_module["a"]) == (set(), 0.0)


def test_a_module_of_which_all_is_excused_in_one_step_is_named() -> None:
    """A gradient that is zero on both sides says nothing."""
    good = step_of(1e-4, a_w=1.0, a_v=1.0, b_w=1.0), {"a_w": 1.0, "a_v": 1.0, "b_w": 1.0}
    bad = step_of(1e-4, a_w=1.0, a_v=0.0, b_w=1.0), {"a_w": 1.0005, "a_v": 0.0, "b_w": 1.0}
    assert gradients_of(good, bad).wholly_excused == {"a"}


def test_an_error_above_a_thousandth_is_never_rounding() -> None:
    found = gradients_of((step_of(1.0, a_w=1.0, b_w=1.0), {"a_w": 1 + 2 * MOST_EXCUSED, "b_w": 1.0}))
    assert found.by_module["a"] > MOST_EXCUSED and not found.ill_conditioned


def test_a_module_without_any_gradient_in_any_step_is_not_exercised() -> None:
    nothing = step_of(a_w=0.0, b_w=1.0), {"a_w": 0.0, "b_w": 1.0}
    something = step_of(a_w=1.0, b_w=1.0), {"a_w": 1.0, "b_w": 1.0}
    found = gradients_of(nothing, nothing)
    assert found.trained - found.exercised == {"a"}
    found = gradients_of(nothing, something)
    assert found.trained == found.exercised == {"a", "b"}


def dump(directory, rank, values, *, cut=None) -> None:
    place = Place(name="a/w", cut=cut, shape=np.shape(values), start=0)
    np.savez(directory / f"parameters-rank-{rank:05d}.npz", **{place.key: np.float32(values).reshape(-1)})


def test_every_replica_is_laid_beside_its_slice_of_the_reference(tmp_path) -> None:
    """The error of a slice counts relative to the whole: a slice of zeros has no size of its own."""
    whole = np.float32([3.0, 4.0, 0.0, 0.0])
    save_parameters(tmp_path, {"a/w": whole})
    for rank, half in ((0, 0), (1, 1), (2, 0), (3, 1)):
        dump(tmp_path, rank, whole[2 * half : 2 * half + 2], cut=Cut(0, half, 2))
    assert _compare_parameters(["a"], tmp_path, ()) == ({"a": 0.0}, "")
    dump(tmp_path, 3, [0.0, 5e-3], cut=Cut(0, 1, 2))
    errors, worst = _compare_parameters(["a"], tmp_path, ())
    assert errors["a"] == pytest.approx(MOST_EXCUSED) and worst == "a/w on rank 3"
    assert errors["a"] > TOLERANCE


def test_a_parameter_whose_gradient_was_excused_may_differ_by_as_much(tmp_path) -> None:
    save_parameters(tmp_path, {"a/w": ONE})
    for error, found in ((0.5 * MOST_EXCUSED, 0.0), (2 * MOST_EXCUSED, 2 * MOST_EXCUSED)):
        dump(tmp_path, 0, [1 + error])
        assert _compare_parameters(["a"], tmp_path, {"a/w"})[0]["a"] == pytest.approx(found, rel=1e-3)


def test_parameters_of_one_side_only_are_an_error(tmp_path) -> None:
    save_parameters(tmp_path, {"a/w": ONE, "a/v": ONE})
    dump(tmp_path, 0, [1.0])
    with pytest.raises(ConfigError, match=r"1 parameters on one side only, e\.g\. a/v"):
        _compare_parameters(["a"], tmp_path, ())


def test_a_reference_step_is_read_as_it_was_written(tmp_path) -> None:
    step = ReferenceStep(losses={"loss": 2.0}, gradients={"a/w": ONE}, rounding={"a/w": 1e-9}, unrepeatable={})
    step.save(tmp_path, 3)
    assert ReferenceStep.load(tmp_path, 3) == step
