"""Dumped numbers back in their places: slices of many ranks, shards of slices. The oracle is numpy, cut by hand."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_mosaic.runtime.dumps.place import Place
from megatron_mosaic.runtime.dumps.reader import read_gradients, read_parameters
from megatron_mosaic.runtime.parameters import Cut


def key(name, array, *, dim=None, rank=0, size=1, pieces=1, start=0, shape=None) -> str:
    cut = None if dim is None else Cut(dim, rank, size, pieces)
    return Place(name=name, cut=cut, shape=shape or array.shape, start=start).key


def write(directory, rank, step=0, **arrays) -> None:
    np.savez(directory / f"step-{step:04d}-rank-{rank:05d}.npz", **arrays)


def test_slices_are_joined_along_their_dim_in_tp_order(tmp_path) -> None:
    """Written by ranks whose order is not the tp order."""
    rows, columns, plain = np.arange(24.0).reshape(12, 2), np.arange(24.0).reshape(2, 12), np.arange(3.0)
    for tp, rank in enumerate((7, 2, 5)):
        own = {"llm/a.weight": (0, rows[4 * tp : 4 * tp + 4]), "llm/b.weight": (1, columns[:, 4 * tp : 4 * tp + 4])}
        arrays = {key(name, array, dim=dim, rank=tp, size=3): array.reshape(-1) for name, (dim, array) in own.items()}
        write(tmp_path, rank, step=3, **arrays)
    write(tmp_path, 11, step=3, **{key("vision/bias", plain): plain})
    write(tmp_path, 11, step=4, **{key("vision/bias", plain): -plain})
    whole = read_gradients(tmp_path, 3)
    assert sorted(whole) == ["llm/a.weight", "llm/b.weight", "vision/bias"]
    np.testing.assert_array_equal(whole["llm/a.weight"], rows)
    np.testing.assert_array_equal(whole["llm/b.weight"], columns)
    np.testing.assert_array_equal(whole["vision/bias"], plain)


def test_twelve_slices_join_by_number_not_by_text(tmp_path) -> None:
    for tp in range(12):
        one = np.array([float(tp)])
        write(tmp_path, tp, **{key("llm/w", one, dim=0, rank=tp, size=12): one})
    np.testing.assert_array_equal(read_gradients(tmp_path, 0)["llm/w"], np.arange(12.0))


def test_halves_of_a_gated_matrix_are_joined_each_by_itself(tmp_path) -> None:
    """Slice 0 holds rows 0-1 of the gate and 0-1 of the values; whole, all gates come first."""
    gate, value = np.arange(8.0).reshape(4, 2), -np.arange(8.0).reshape(4, 2)
    for tp in range(2):
        own = np.concatenate([gate[2 * tp : 2 * tp + 2], value[2 * tp : 2 * tp + 2]])
        write(tmp_path, tp, **{key("llm/fc1", own, dim=0, rank=tp, size=2, pieces=2): own.reshape(-1)})
    np.testing.assert_array_equal(read_gradients(tmp_path, 0)["llm/fc1"], np.concatenate([gate, value]))


@given(st.data())
def test_shards_of_slices_are_the_whole_and_what_nobody_wrote_is_no_number(tmp_path_factory, data) -> None:
    directory = tmp_path_factory.mktemp("dump")
    size, dim = data.draw(st.integers(1, 3)), data.draw(st.integers(0, 1))
    whole = np.random.default_rng(0).standard_normal((6, 6)).astype(np.float32)
    lost = data.draw(st.integers(0, 35))
    for tp, own in enumerate(np.split(whole, size, axis=dim)):
        flat = own.reshape(-1)
        ends = sorted({0, len(flat), *data.draw(st.lists(st.integers(0, len(flat)), max_size=3))})
        for dp, (start, stop) in enumerate(pairwise(ends)):
            place = {"dim": dim, "rank": tp, "size": size, "start": start, "shape": own.shape}
            if not (tp == 0 and start <= lost < stop):
                write(directory, 10 * tp + dp, **{key("m/w", own, **place): flat[start:stop]})
    found = read_gradients(directory, 0).get("m/w")
    if found is not None:
        missing = np.isnan(found)
        np.testing.assert_array_equal(found[~missing], whole[~missing])
        assert missing.any() == (lost < whole.size // size)


@given(st.integers(1, 3), st.integers(0, 1), st.integers(0, 20), st.integers(1, 2))
def test_a_place_is_its_key_and_finds_its_numbers_in_the_whole(size, dim, start, pieces) -> None:
    whole = np.arange(144, dtype=np.float32).reshape(12, 12)
    for tp in range(size):
        halves = [np.split(half, size, axis=dim)[tp] for half in np.split(whole, pieces, axis=dim)]
        own = np.concatenate(halves, axis=dim)
        place = Place(name="m/w", cut=Cut(dim, tp, size, pieces), shape=own.shape, start=start)
        assert Place.parse(place.key) == place
        np.testing.assert_array_equal(place.of(whole, 7), own.reshape(-1)[start : start + 7])


def test_parameters_come_with_their_rank(tmp_path) -> None:
    for rank in (3, 12):
        array = np.array([float(rank)])
        np.savez(tmp_path / f"parameters-rank-{rank:05d}.npz", **{key("m/w", array): array})
    found = {rank: (place.name, place.cut, array.tolist()) for rank, place, array in read_parameters(tmp_path)}
    assert found == {3: ("m/w", None, [3.0]), 12: ("m/w", None, [12.0])}


@pytest.mark.parametrize("shape", [(), (3,), (2, 3, 4)])
def test_any_shape_has_a_key(shape) -> None:
    place = Place(name="m/w", cut=None, shape=shape, start=0)
    assert Place.parse(place.key) == place
