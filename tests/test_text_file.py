"""Text files that users give: read, or refused by name without waiting, however odd what stands there."""

import os
import socket
import tracemalloc
from pathlib import Path

import pytest

from megatron_mosaic.cost_model.hardware.gpu_type_file import load_gpu_type_file
from megatron_mosaic.cost_model.hardware.profile import load_profile
from megatron_mosaic.cost_model.published.rows import load_table
from megatron_mosaic.errors import ConfigError, MosaicError, PlanError, ProfileError, ScheduleError
from megatron_mosaic.plan.plan_file import load_plan
from megatron_mosaic.plan.workload_file import load_workload_file
from megatron_mosaic.schedules.text import load_schedule
from megatron_mosaic.text_file import MAX_BYTES, FileKind, read_text_file

KIND = FileKind(what="a plan file", error=PlanError, fix="make one", max_bytes=1000)


def make_fifo(path: Path) -> None:
    os.mkfifo(path)


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(path))  # the path of a socket may have a hundred characters


def make_loop(path: Path) -> None:
    path.symlink_to(path)


def make_large(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(10**9)  # a hole: no disk is used


MAKE = {
    "a directory": Path.mkdir,
    "a FIFO (a pipe)": make_fifo,
    "a character device": lambda path: path.symlink_to("/dev/zero"),
    "a socket": make_socket,
    "a link to 'nowhere', which is not there": lambda path: path.symlink_to("nowhere"),
    "symbolic links": make_loop,
    "no such file": lambda path: None,
    "1000000000 bytes": make_large,
    "1001 bytes": lambda path: path.write_bytes(b"x" * 1001),
    "byte 0xff in line 3, which is not UTF-8": lambda path: path.write_bytes(b"a\n\n\xff"),
    "a NUL byte in line 2": lambda path: path.write_bytes(b"a\nb\0"),
}


@pytest.mark.parametrize("got", MAKE)
def test_refuses(tmp_path, monkeypatch, got):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "file"
    MAKE[got](path)
    tracemalloc.start()
    try:
        with pytest.raises(PlanError) as caught:
            read_text_file(path, KIND)
        assert tracemalloc.get_traced_memory()[1] < 10**6
    finally:
        tracemalloc.stop()
    assert got in caught.value.got
    assert caught.value.where == str(path)
    assert caught.value.expected.startswith("a plan file")
    assert caught.value.fix


def test_a_path_that_cannot_be_one(tmp_path):
    with pytest.raises(PlanError) as caught:
        read_text_file("a\0b", KIND)
    assert (caught.value.where, caught.value.got) == (r"'a\x00b'", "a path that cannot be one")
    with pytest.raises(PlanError) as caught:
        read_text_file(tmp_path / ("x" * 5000), KIND)
    assert "too long" in caught.value.got
    assert len(caught.value.where) < 300


def test_a_file_that_may_not_be_read(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_text("a")

    def refuse(*_: object) -> int:  # the tests may run as root, whom no mode stops
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(PlanError) as caught:
        read_text_file(path, KIND)
    assert (caught.value.got, caught.value.fix) == ("Permission denied", "check the path and its permissions")


def test_reads(tmp_path):
    path, link = tmp_path / "file", tmp_path / "link"
    link.symlink_to(path)
    for data, text in ((b"", ""), (b"\xef\xbb\xbfa: \xc3\xa9\r\nb\rc\n", "a: é\nb\nc\n"), (b"x" * 1000, "x" * 1000)):
        path.write_bytes(data)
        assert read_text_file(path, KIND) == read_text_file(str(link), KIND) == text
    assert "VmRSS" in read_text_file("/proc/self/status", FileKind(what="", error=PlanError, fix=""))  # says size 0


@pytest.mark.parametrize(
    ("load", "error"),
    [
        (load_plan, PlanError),
        (load_workload_file, ConfigError),
        (load_profile, ProfileError),
        (lambda path: load_gpu_type_file(path, ["h100_sxm"]), ConfigError),
        (load_schedule, ScheduleError),
        (load_table, ConfigError),
    ],
)
def test_every_reader_refuses_in_its_own_words(tmp_path, load, error):
    make_fifo(tmp_path / "fifo")
    make_large(tmp_path / "large")
    for name, got in (("fifo", "a FIFO (a pipe)"), ("large", "1000000000 bytes"), ("none", "no such file")):
        with pytest.raises(MosaicError) as caught:
            load(tmp_path / name)
        assert type(caught.value) is error
        assert caught.value.got == got
        assert caught.value.fix
    assert MAX_BYTES < 10**9
