"""A pickle in a checkpoint does not run: through torch's and Megatron's own loads, once `install` was called.

Each payload makes a directory when it is built. The control loads it with plain pickle, which does make it.
"""

import io
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from megatron.core.dist_checkpointing import serialization
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import Metadata

from megatron_mosaic import run
from megatron_mosaic.launch.forked import run_forked
from megatron_mosaic.parallel_state_ext.rebound import checkpoint_io
from megatron_mosaic.parallel_state_ext.rebound.checkpoint_io import RefusedPickle, load_metadata, load_object
from megatron_mosaic.plan.plan_file import save_plan
from tests.numerics.parity_cases import ONE_RANK


class Payload:
    """Makes a directory when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def saved_as_object(value: Any) -> io.BytesIO:
    stream = io.BytesIO()
    torch.save(value, stream)
    stream.seek(0)
    return stream


def in_metadata(payload: Any) -> Metadata:
    return Metadata(state_dict_metadata={"weight": payload})


@pytest.mark.parametrize("wrap", [lambda payload: payload, in_metadata, lambda payload: [payload]])
@pytest.mark.parametrize("protocol", [2, pickle.HIGHEST_PROTOCOL])
def test_metadata_builds_listed_classes_only(wrap: Callable[[Any], Any], protocol: int, tmp_path) -> None:
    text = pickle.dumps(wrap(Payload(tmp_path / "ran")), protocol)
    with pytest.raises(RefusedPickle, match=r"builds posix\.mkdir"):
        load_metadata(io.BytesIO(text))
    assert not (tmp_path / "ran").exists()
    pickle.loads(text)
    assert (tmp_path / "ran").exists(), "the payload is none"


@pytest.mark.parametrize(
    "text",
    [
        pytest.param(b"cbuiltins\neval\n.", id="eval"),
        pytest.param(b"\x80\x04\x8c\x05torch\x8c\x16serialization.os.mkdir\x93.", id="a name with dots"),
        pytest.param(b"ctorch\nload\n.", id="a listed module, another name"),
        pytest.param(b"cmegatron_mosaic.nothing_imports_this\nit\n.", id="would import"),
    ],
)
def test_no_name_reaches_beyond_the_list(text: bytes) -> None:
    with pytest.raises(RefusedPickle):
        load_metadata(io.BytesIO(text))


def test_what_is_not_metadata_or_is_cut_is_refused() -> None:
    whole = pickle.dumps(in_metadata(torch.Size([2])))
    assert load_metadata(io.BytesIO(whole)) == in_metadata(torch.Size([2]))
    with pytest.raises(RefusedPickle, match="a list where torch's Metadata"):
        load_metadata(io.BytesIO(pickle.dumps([])))
    for length in range(len(whole)):
        with pytest.raises((pickle.UnpicklingError, EOFError)):
            load_metadata(io.BytesIO(whole[:length]))


CLASS = b"ctorch.distributed.checkpoint.metadata\nMetadata\n"
MEMBER = b"ctorch.distributed.checkpoint.planner\nWriteItemType\n(I1\ntR"


@pytest.mark.parametrize("given", [CLASS, MEMBER], ids=["class", "member of an enumeration"])
@pytest.mark.parametrize("attribute", ["version", "_value_"])
def test_what_the_process_shares_stays_as_it_is(given: bytes, attribute: str) -> None:
    """State of an object can be set on a class: (None, {name: value}) is state for slots."""
    from torch.distributed.checkpoint.planner import WriteItemType

    text = given + b"(N(S'" + attribute.encode() + b"'\nI7\ndtb."
    before = Metadata.__dataclass_fields__["version"].default, WriteItemType.TENSOR.value, dict(vars(Metadata))
    with pytest.raises(RefusedPickle, match=r"changes .*, which is not its own"):
        load_metadata(io.BytesIO(text))
    assert before == (Metadata(state_dict_metadata={}).version, WriteItemType.TENSOR.value, dict(vars(Metadata)))


@pytest.mark.parametrize("wrap", [lambda payload: [payload], lambda payload: {"args": payload}])
def test_objects_are_of_torchs_and_megatrons_list(wrap: Callable[[Any], Any], tmp_path) -> None:
    stream = saved_as_object(wrap(Payload(tmp_path / "ran")))
    with pytest.raises(RefusedPickle, match=r"builds posix\.mkdir"):
        load_object(stream, "common_state/shard_0_1")
    assert not (tmp_path / "ran").exists()
    torch.load(saved_as_object(wrap(Payload(tmp_path / "ran"))), weights_only=False)
    assert (tmp_path / "ran").exists(), "the payload is none"


@pytest.mark.parametrize("old", [False, True])
def test_extra_state_is_bytes_that_are_unpickled_later(old: bool, tmp_path) -> None:
    """As TransformerEngine does: a tensor of bytes, before its version 2 a stream."""

    def extra_state(value: Any) -> io.BytesIO:
        text = bytearray(pickle.dumps(value))
        return saved_as_object([saved_as_object(value) if old else torch.frombuffer(text, dtype=torch.uint8)])

    name = "llm.block.layers.mlp.linear_fc1._extra_state/shard_0_4"
    with pytest.raises(RefusedPickle, match=r"posix\.mkdir"):
        load_object(extra_state(Payload(tmp_path / "ran")), name)
    assert not (tmp_path / "ran").exists()
    assert len(load_object(extra_state({"scale": torch.ones(2)}), name)) == 1
    assert load_object(saved_as_object([torch.empty(0, dtype=torch.uint8)]), name)[0].numel() == 0


@pytest.fixture
def installed(monkeypatch):
    """Puts the stock names back afterwards."""
    monkeypatch.setattr(torch.distributed.checkpoint.filesystem, "pickle", pickle)
    monkeypatch.setattr(DefaultLoadPlanner, "load_bytes", DefaultLoadPlanner.load_bytes)
    monkeypatch.setattr(serialization, "load_common", serialization.load_common)
    checkpoint_io.install()
    checkpoint_io.install()


def test_torchs_own_load_is_restricted(installed, tmp_path) -> None:
    state = {"weight": torch.arange(4.0), "object": "step 3"}
    dcp.save(state, checkpoint_id=tmp_path / "good", no_dist=True)
    found = {"weight": torch.zeros(4), "object": None}
    dcp.load(found, checkpoint_id=tmp_path / "good", no_dist=True)
    assert torch.equal(found["weight"], state["weight"]) and found["object"] == "step 3"

    dcp.save({**state, "object": Payload(tmp_path / "ran")}, checkpoint_id=tmp_path / "object", no_dist=True)
    with pytest.raises(dcp.CheckpointException, match=r"builds posix\.mkdir"):
        dcp.load(found, checkpoint_id=tmp_path / "object", no_dist=True)
    (tmp_path / "good" / ".metadata").write_bytes(pickle.dumps(in_metadata(Payload(tmp_path / "ran"))))
    with pytest.raises(RefusedPickle):
        FileSystemReader(tmp_path / "good").read_metadata()
    assert not (tmp_path / "ran").exists()


def test_megatrons_old_common_state_is_restricted_whatever_the_environment_says(
    installed, tmp_path, monkeypatch
) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    (tmp_path / "metadata.json").write_text('{"sharded_backend": "torch_dist"}')
    torch.save({"iteration": 2}, tmp_path / "common.pt")
    assert serialization.load_common_state_dict(str(tmp_path)) == {"iteration": 2}
    torch.save({"args": Payload(tmp_path / "ran")}, tmp_path / "common.pt")
    with pytest.raises(RefusedPickle):
        serialization.load_common_state_dict(str(tmp_path))
    assert not (tmp_path / "ran").exists()


def test_a_stock_script_under_a_plan_loads_listed_classes_only(tmp_path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import io, pickle, os\n"
        "from torch.distributed.checkpoint import filesystem\n"
        "class Payload:\n"
        "    def __reduce__(self):\n"
        f"        return os.mkdir, ({str(tmp_path / 'ran')!r},)\n"
        "try:\n"
        "    filesystem.pickle.load(io.BytesIO(pickle.dumps(Payload())))\n"
        "except pickle.UnpicklingError:\n"
        f"    os.mkdir({str(tmp_path / 'refused')!r})\n"
    )
    save_plan(ONE_RANK, tmp_path / "plan.yaml")
    run_forked(1, run.main, [str(script), "--mosaic-plan", str(tmp_path / "plan.yaml")])
    assert (tmp_path / "refused").exists() and not (tmp_path / "ran").exists()
