"""What is wrong with a checkpoint is said by name on every rank, before anything of it is built; faults while saving.

Spoiled checkpoints are copies of one that a run saved. Nobody trains on them: `Checkpoints.load` must refuse first.
"""

import argparse
import functools
import json
import os
import pickle
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.strategies import filesystem_async
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter

from megatron_mosaic.errors import ConfigError
from megatron_mosaic.runtime import checkpoint
from megatron_mosaic.runtime.checkpoint_files import inspection, manifest
from tests.forked import run_gloo
from tests.numerics import parity_cases as cases
from tests.numerics.checkpoint_runs import SMALL_PLAN, Run, failure_of, loading, losses, run_all, saving
from tests.parallel_state_ext.rebound.test_checkpoint_io import Payload, saved_as_object

pytestmark = pytest.mark.dist


def arguments(**given: Any) -> argparse.Namespace:
    """What `Checkpoints` asks of Megatron's arguments."""
    stock = {
        "save": None, "load": None, "ckpt_step": None, "pretrained_checkpoint": None, "ckpt_format": "torch_dist",
        "use_distributed_optimizer": False, "no_save_rng": False, "no_load_rng": False, "finetune": False,
        "no_load_optim": False, "override_opt_param_scheduler": False, "use_checkpoint_opt_param_scheduler": False,
        "global_batch_size": 4,
    }  # fmt: skip
    return argparse.Namespace(**{**stock, **given})


def checkpoints_of(**given: Any) -> checkpoint.Checkpoints:
    world = dist.group.WORLD if dist.is_initialized() else None
    return checkpoint.Checkpoints(arguments(**given), SMALL_PLAN, cases.WORKLOAD, world, None)


def sign_again(directory: Path) -> None:
    """As someone would who changes files and can write."""
    path = directory / manifest.MANIFEST_FILE
    before = manifest.read_manifest(path)
    files = manifest.sum_up_files(directory, 0, 1)
    sizes, sums = ({name: found[part] for name, found in files.items()} for part in (0, 1))
    manifest.write_manifest(directory, SMALL_PLAN, replace(before, bytes_by_file=sizes, crc32_by_file=sums))


def flip(name: str) -> Callable[[Path], None]:
    def spoil(directory: Path) -> None:
        content = bytearray((directory / name).read_bytes())
        content[len(content) // 2] ^= 1
        (directory / name).write_bytes(content)

    return spoil


def edit(name: str, before: str, after: str) -> Callable[[Path], None]:
    return lambda at: (at / name).write_text((at / name).read_text().replace(before, after)) and None


def cut(name: str) -> Callable[[Path], None]:
    return lambda directory: os.truncate(directory / name, (directory / name).stat().st_size // 2)


def remove(*names: str) -> Callable[[Path], None]:
    def spoil(directory: Path) -> None:
        for name in names:
            (directory / name).unlink()

    return spoil


def without_a_plan(spoil: Callable[[Path], None]) -> Callable[[Path], None]:
    """The same in a checkpoint that has neither sizes nor sums."""

    def both(directory: Path) -> None:
        remove(manifest.PLAN_FILE, manifest.MANIFEST_FILE)(directory)
        spoil(directory)

    return both


def signed(spoil: Callable[[Path], None]) -> Callable[[Path], None]:
    def both(directory: Path) -> None:
        spoil(directory)
        sign_again(directory)

    return both


def change_metadata(change: Callable[[Any], None]) -> Callable[[Path], None]:
    def spoil(directory: Path) -> None:
        metadata = FileSystemReader(directory).read_metadata()
        change(metadata)
        (directory / ".metadata").write_bytes(pickle.dumps(metadata))

    return spoil


def replace_object(start: str, value_of: Callable[[Path], Any]) -> Callable[[Path], None]:
    """Another object in the place of the last whose name starts so: appended to its file."""

    def spoil(directory: Path) -> None:
        new = saved_as_object(value_of(directory)).getvalue()

        def change(metadata: Any) -> None:
            index = [index for index in metadata.storage_data if index.fqn.startswith(start)][-1]
            path = directory / metadata.storage_data[index].relative_path
            at = replace(metadata.storage_data[index], offset=path.stat().st_size, length=len(new))
            path.write_bytes(path.read_bytes() + new)
            metadata.storage_data[index] = at

        change_metadata(change)(directory)

    return spoil


def payload_in_metadata(directory: Path) -> None:
    change_metadata(lambda metadata: metadata.state_dict_metadata.update(x=Payload(directory / "ran")))(directory)


def payload_in_common_file(directory: Path) -> None:
    (directory / "common.pt").write_bytes(saved_as_object({"args": Payload(directory / "ran")}).getvalue())


def payload_in_extra_state(directory: Path) -> list[torch.Tensor]:
    return [torch.frombuffer(bytearray(pickle.dumps(Payload(directory / "ran"))), dtype=torch.uint8)]


def elsewhere(metadata: Any) -> None:
    index = next(iter(metadata.storage_data))
    metadata.storage_data[index] = replace(metadata.storage_data[index], relative_path="../../../elsewhere")


RUNS, ADD = "builds posix.mkdir, which no checkpoint needs", "torch.serialization.add_safe_globals"
FLIPPED, STEP_2 = "its bytes changed after they were saved", "use --ckpt-step 2, which is complete"
SPOILED: dict[str, tuple[Callable[[Path], None], str, str, str]] = {  # -> where, got, fix
    "payload in metadata": (signed(payload_in_metadata), ".metadata", RUNS, STEP_2),
    "payload, unsigned": (without_a_plan(payload_in_metadata), ".metadata", RUNS, STEP_2),
    "payload in common state": (
        signed(replace_object("common_state", lambda at: [{"args": Payload(at / "ran")}])),
        "__0_0.distcp, object common_state/shard_0_1", RUNS, ADD,
    ),
    "payload in the other rank's streams": (
        signed(replace_object("~rng", lambda at: [Payload(at / "ran")])),
        "__1_0.distcp, object ~rng/shard_1_2", RUNS, ADD,
    ),
    "payload in extra state": (
        signed(replace_object("llm.output_layer._extra_state", payload_in_extra_state)),
        "__0_0.distcp, object llm.output_layer._extra_state", "disallowed class 'posix.mkdir'", ADD,
    ),
    "payload in an added common.pt": (payload_in_common_file, "common.pt, object common.pt", RUNS, ADD),
    "tensors elsewhere": (signed(change_metadata(elsewhere)), ".metadata", "tensors in ../../../elsewhere", STEP_2),
    "flipped tensors": (flip("__1_0.distcp"), "__1_0.distcp", FLIPPED, STEP_2),
    "flipped metadata": (flip(".metadata"), ".metadata", FLIPPED, STEP_2),
    "flipped metadata.json": (flip("metadata.json"), "metadata.json", FLIPPED, STEP_2),
    "flipped plan": (
        edit("mosaic_plan.yaml", "0-1", "0,1"), "mosaic_plan.yaml", FLIPPED, STEP_2
    ),
    "cut metadata": (cut(".metadata"), ".metadata", "bytes", STEP_2),
    "cut metadata, no plan": (without_a_plan(cut(".metadata")), ".metadata", "UnpicklingError: pickle data", STEP_2),
    "cut metadata.json, no plan": (without_a_plan(cut("metadata.json")), "metadata.json", "JSONDecodeError", STEP_2),
    "cut manifest": (cut(manifest.MANIFEST_FILE), manifest.MANIFEST_FILE, "JSONDecodeError", "not saved to its end"),
    "no manifest": (remove(manifest.MANIFEST_FILE), manifest.MANIFEST_FILE, "FileNotFoundError", STEP_2),
    "no plan": (remove("mosaic_plan.yaml"), "mosaic_plan.yaml", "no such file", STEP_2),
    "no metadata": (remove(".metadata"), ".metadata", "no such file", STEP_2),
    "no metadata, no plan": (without_a_plan(remove(".metadata")), ".metadata", "FileNotFoundError", STEP_2),
    "another format": (without_a_plan(remove("metadata.json")), "metadata.json", "no such file", STEP_2),
}  # fmt: skip


def _each_is_refused(directories: list[Path]) -> None:
    for directory in directories:
        with pytest.raises(ConfigError) as refusal:
            checkpoints_of(load=str(directory)).load([None], None, None)
        (directory / f"refusal-{dist.get_rank()}").write_text(str(refusal.value))


def test_every_spoiled_checkpoint_is_refused_on_every_rank_and_no_payload_runs(saved, tmp_path) -> None:
    for name, (spoil, *_) in SPOILED.items():
        shutil.copytree(saved, tmp_path / name)
        spoil(tmp_path / name / "iter_0000004")
    run_gloo(2, _each_is_refused, [tmp_path / name for name in SPOILED])
    for name, (_, where, got, fix) in SPOILED.items():
        first, second = ((tmp_path / name / f"refusal-{rank}").read_text() for rank in range(2))
        assert first == second, name
        lines = first.splitlines()
        assert where in lines[0] and got in lines[1] and fix in lines[-1], (name, first)
        assert not (tmp_path / name / "iter_0000004" / "ran").exists(), name


def test_every_file_is_read_by_one_rank(saved) -> None:
    sizes = inspection.inspect_checkpoint(str(saved), None, cases.WORKLOAD).bytes_by_file
    data = {"__0_0.distcp", "__1_0.distcp"}
    assert sizes.keys() == {".metadata", "metadata.json", "mosaic_plan.yaml"} | data
    for num_ranks in (1, 2, 3, 7):
        shares = [list(inspection._share_of(sizes, rank, num_ranks)) for rank in range(num_ranks)]
        assert sorted(name for share in shares for name in share) == sorted(sizes)
        assert len([share for share in shares if data.intersection(share)]) == min(num_ranks, 2)


def test_sums_are_optional(saved, capsys) -> None:
    """Checkpoints from before sums were kept load, with a note: in them a flipped byte goes unseen."""
    path = saved / "iter_0000004" / manifest.MANIFEST_FILE
    inspection.inspect_checkpoint(str(saved), None, cases.WORKLOAD)
    assert "no checksums" not in capsys.readouterr().out
    content = json.loads(path.read_text())
    del content["crc32_by_file"], content["bytes_by_file"]["mosaic_plan.yaml"]
    path.write_text(json.dumps(content))
    flip("__1_0.distcp")(saved / "iter_0000004")
    inspection.check_share(inspection.inspect_checkpoint(str(saved), None, cases.WORKLOAD), 0, 1)
    assert f"{saved / 'iter_0000004'} has no checksums" in capsys.readouterr().out


def test_what_changes_after_the_check_does_not_run_either(saved, tmp_path, monkeypatch) -> None:
    """The load itself builds listed classes only."""
    stock = checkpoint.check_share

    def check_then_spoil(found: Any, rank: int, num_ranks: int) -> None:
        stock(found, rank, num_ranks)
        if rank == 0:
            payload_in_metadata(saved / "iter_0000002")

    monkeypatch.setattr(checkpoint, "check_share", check_then_spoil)
    got = failure_of(tmp_path, "late", *loading(tmp_path))
    assert RUNS in got and "status 2" in got
    assert not (saved / "iter_0000002" / "ran").exists()


def test_another_length_of_the_run_says_what_to_pass(saved, tmp_path) -> None:
    """Saved with --train-iters 4, which is where the schedules of learning rate and weight decay end too."""
    longer = (*loading(tmp_path), "--train-iters", "6")
    got = failure_of(tmp_path, "longer", *longer)
    assert "--lr-decay-iters, or --train-iters without it" in got and "24 samples (6 steps)" in got
    assert "16 samples (4 steps)" in got and "status 2" in got
    words = ("--override-opt-param-scheduler", "--use-checkpoint-opt-param-scheduler")
    assert all(word in got for word in words)
    run_all([Run(name=word, plan=SMALL_PLAN, arguments=(*longer, word)) for word in words], tmp_path)
    for word in words:
        assert losses(tmp_path, word)[:2] == losses(tmp_path, "whole")[2:] and len(losses(tmp_path, word)) == 4


def test_an_argument_that_no_load_would_build_is_refused_before_training(tmp_path) -> None:
    checkpoints_of(save=str(tmp_path), mine=[1, {"two": torch.float32}])
    with pytest.raises(ConfigError, match="argument 'mine' of the script") as refusal:
        checkpoints_of(save=str(tmp_path), other=3, mine=[Payload(tmp_path / "ran")])
    assert "builds posix.mkdir" in str(refusal.value)
    assert not (tmp_path / "ran").exists()


@pytest.fixture
def disk(tmp_path) -> Iterator[Path]:
    """A file system of 8 MB: room for one checkpoint of the small plan and most of a second."""
    (tmp_path / "disk").mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(tmp_path / "disk")], check=False)
    if made.returncode:
        pytest.skip("no right to mount a file system here")
    yield tmp_path / "disk"
    subprocess.run(["umount", str(tmp_path / "disk")], check=True)


def _fails_on_a_read_only_directory(directory: Path, read_only: Path | None) -> None:
    """Refused before training; later, and on one rank alone, on every rank."""
    if read_only is not None:
        with pytest.raises(ConfigError, match="Read-only file system"):
            checkpoints_of(save=str(read_only / "new"))
        with pytest.raises(ConfigError, match="no right to write") as refusal:
            checkpoints_of(save=str(read_only))
        assert "the last complete one is iteration 4" in refusal.value.fix
    checkpoints = checkpoints_of(save=str(directory))
    stock = os.access
    os.access = lambda path, mode: dist.get_rank() == 0 and stock(path, mode)
    with pytest.raises(ConfigError) as refusal:
        checkpoints.save(6, [SimpleNamespace(rng_states=None)])
    assert "iter_0000006\n" in str(refusal.value) and "no right to write" in str(refusal.value)
    assert "the last complete one is iteration 4" in refusal.value.fix and "--save" in refusal.value.fix


def test_a_read_only_directory_is_refused_on_every_rank(saved, disk) -> None:
    shutil.copytree(saved / "iter_0000004", disk / "iter_0000004")
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    run_gloo(2, _fails_on_a_read_only_directory, saved, disk)


def test_a_full_disk_says_so_and_the_checkpoint_before_stays_the_last(disk, tmp_path) -> None:
    save = ("--save", str(disk), "--save-interval", "2")
    got = failure_of(tmp_path, "full", *save)
    assert "No space left on device" in got and f"checkpoint {disk / 'iter_0000004'}" in got and "status 2" in got
    assert "the last complete one is iteration 2" in got
    assert (disk / "latest_checkpointed_iteration.txt").read_text() == "2"
    assert not (disk / "iter_0000004" / manifest.MANIFEST_FILE).exists()
    shutil.rmtree(disk / "iter_0000004")
    run_all([Run(name="resumed", plan=SMALL_PLAN, arguments=("--load", str(disk)))], tmp_path)
    assert len(losses(tmp_path, "resumed")) == 2


def _write_item(*given: Any, **named: Any) -> Any:
    """The tensors of rank 1: Megatron gathers what failed."""
    if dist.get_rank() == 1:
        raise OSError(28, "No space left on device")
    return STOCK_WRITE(*given, **named)


def _finish(*_: Any) -> None:
    """`.metadata`, by rank 0 alone while the others wait for it."""
    raise OSError(28, "No space left on device")


STOCK_WRITE = filesystem_async._write_item


@pytest.mark.parametrize(
    ("owner", "name", "broken", "says"),
    [
        (filesystem_async, "_write_item", functools.wraps(STOCK_WRITE)(_write_item), "rank 1: OSError"),
        (FileSystemWriter, "finish", _finish, "got:      OSError"),
    ],
    ids=["tensors", "metadata"],
)
def test_a_rank_that_cannot_write_says_so(owner, name, broken, says, saved, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(owner, name, broken)
    got = failure_of(tmp_path, "full", *loading(tmp_path), *saving(tmp_path)[:2], "--save-interval", "3")
    assert f"{says}: [Errno 28] No space left on device" in got and "status 2" in got
    assert f"checkpoint {saved / 'iter_0000003'}" in got and "the last complete one is iteration 4" in got
