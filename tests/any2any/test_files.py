"""Samples in files: the same numbers as in memory, and no more of the files is read than was asked for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_mosaic.any2any.data import DigitsDataset, collate
from megatron_mosaic.any2any.files.packed import INDEX_FILE, RECORDS_FILE, PackedDigits, collate_packed, write_packed
from megatron_mosaic.any2any.files.unread import Unread
from megatron_mosaic.any2any.sizes import Any2AnySizes, DigitsMix
from megatron_mosaic.errors import ConfigError
from megatron_mosaic.launch.forked import run_forked, with_command_line
from megatron_mosaic.parallel_state_ext.boundaries.fingerprints import fingerprint_samples

ROOT = Path(__file__).resolve().parents[2]
SIZES = Any2AnySizes()
NUM_SAMPLES = 40


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    dataset = DigitsDataset("train", sizes=SIZES, mix=DigitsMix(), num_samples=NUM_SAMPLES, seed=7)
    directory = tmp_path_factory.mktemp("digits") / "train"
    write_packed(dataset, directory)
    return dataset, directory


numbers = st.lists(st.integers(0, NUM_SAMPLES - 1), min_size=1, max_size=6)


@settings(max_examples=25, deadline=None)
@given(numbers=numbers, data=st.data())
def test_a_batch_of_files_is_the_batch_of_memory(written, numbers, data):
    """The oracle: `data.collate` of the dataset that was written."""
    dataset, directory = written
    packed = PackedDigits(directory, SIZES.seq_length)
    found = collate_packed([packed[number] for number in numbers])
    expected = collate([dataset[number] for number in numbers])
    assert found.keys() == expected.keys()
    assert packed.bytes_read == 0
    for key, value in expected.items():
        column = found[key]
        if not isinstance(column, Unread):
            assert torch.equal(column, value)
            continue
        assert column.shape == value.shape and len(column) == len(value)
        rows = data.draw(st.lists(st.integers(0, len(value) - 1), max_size=4) if len(value) else st.just([]))
        assert torch.equal(column[torch.tensor(rows, dtype=torch.long)], value[rows])


def test_what_is_not_asked_for_is_not_read(written):
    _, directory = written
    packed = PackedDigits(directory, SIZES.seq_length)
    with np.load(directory / INDEX_FILE) as index:
        lengths = index["text"][:, 1]
    batch = collate_packed([packed[number] for number in range(8)])
    batch["tokens"][torch.tensor([2, 5])]
    batch["labels"][torch.tensor([2])]  # the same record, which was kept
    assert packed.bytes_read == int(lengths[2] + lengths[5])


def test_other_samples_have_other_fingerprints(written):
    _, directory = written
    packed = PackedDigits(directory, SIZES.seq_length)
    first, second = (collate_packed([packed[i] for i in numbers]) for numbers in ((0, 1), (0, 2)))
    assert fingerprint_samples(first) != fingerprint_samples(second)
    assert fingerprint_samples(first) == fingerprint_samples(collate_packed([packed[0], packed[1]]))
    assert packed.bytes_read == 0


def test_files_that_do_not_fit_are_refused(written, tmp_path):
    _, directory = written
    with pytest.raises(ConfigError, match="--seq-length"):
        PackedDigits(directory, SIZES.seq_length + 1)
    with pytest.raises(ConfigError, match="pack_digits"):
        PackedDigits(tmp_path, SIZES.seq_length)


def test_a_broken_index_is_refused(written, tmp_path):
    _, directory = written
    whole = (directory / INDEX_FILE).read_bytes()
    with np.load(directory / INDEX_FILE) as index:
        columns = {key: index[key] for key in index.files}
    (tmp_path / RECORDS_FILE).write_bytes(b"")

    def require_refused(says: str) -> None:
        with pytest.raises(ConfigError, match="pack_digits") as caught:
            PackedDigits(tmp_path, SIZES.seq_length)
        assert says in caught.value.got

    for length in (0, 10, len(whole) // 2, len(whole) - 1):
        (tmp_path / INDEX_FILE).write_bytes(whole[:length])
        require_refused(str(tmp_path))
    np.savez(tmp_path / INDEX_FILE, **{key: value for key, value in columns.items() if key != "gen"})
    require_refused("gen")
    np.savez(tmp_path / INDEX_FILE, **columns | {"text": columns["text"][:0]})
    require_refused("no samples")


def read_table() -> dict[str, list[int]]:
    """Bytes of every rank under the plans of scripts/bytes_read.py, and `all` of the records."""
    command = [sys.executable, str(ROOT / "scripts" / "bytes_read.py"), "--steps", "3", "--json"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=250, check=True)
    table = json.loads(run.stdout.splitlines()[-1])
    return table["bytes"] | {"all": [table["all"]]}


def test_bytes_of_a_rank_fall_with_dp():
    """What ranks that share the samples read together is everything once."""
    table = read_table()
    assert table["dp 1"] == table["all"]
    for plan, dp in (("dp 2", 2), ("dp 4", 4)):
        assert sum(table[plan]) == table["all"][0]
        assert max(table[plan]) < 1.4 * table["all"][0] / dp
    assert sum(table["disjoint"]) == table["all"][0]


def train_and_count(directory: str) -> int:
    """On a rank: train on files; the bytes that were read of records are left in a file."""
    from megatron_mosaic.any2any import pretrain

    opened = []

    class Counted(pretrain.PackedDigits):
        def __init__(self, *args):
            super().__init__(*args)
            opened.append(self)

    pretrain.PackedDigits = Counted
    pretrain.train()
    Path(directory, f"bytes-{os.environ['RANK']}").write_text(str(sum(dataset.bytes_read for dataset in opened)))
    return 0


@pytest.mark.slow
def test_training_reads_what_was_counted_and_computes_the_same(tmp_path):
    from megatron_mosaic.any2any import pretrain  # noqa: F401  forked ranks inherit it
    from megatron_mosaic.parallel_state_ext.rebound import cpu
    from megatron_mosaic.runtime import train  # noqa: F401

    cpu.install()
    pack = [sys.executable, str(ROOT / "scripts" / "pack_digits.py"), str(tmp_path / "files"), "--samples", "48"]
    subprocess.run(pack, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True, timeout=100)
    entry = "{ranks: 0-1, layout: {dp: 2}}"
    modules = "".join(f"  {name}: {entry}\n" for name in ("vision", "llm", "generator"))
    plan = tmp_path / "plan.yaml"
    plan.write_text(
        "mosaic_plan: 1\nworkload: any2any-digits\nworld_size: 2\nglobal_batch_size: 16\nmicro_batch_size: 2\n"
        f"schedule: 1f1b\nmodules:\n{modules}"
    )
    losses = []
    for name, more in (("files", ["--digits-files", str(tmp_path / "files")]), ("memory", [])):
        words = ["--mosaic-plan", str(plan), "--mosaic-report", str(tmp_path / name), "--train-iters", "3"]
        words += ["--eval-iters", "0", *more]
        run_forked(2, with_command_line, words, train_and_count, str(tmp_path))
        losses.append((tmp_path / name / "losses.jsonl").read_text())
        if name == "files":
            counts = [int((tmp_path / f"bytes-{rank}").read_text()) for rank in range(2)]
    assert losses[0] == losses[1]
    assert counts == read_table()["dp 2"]
