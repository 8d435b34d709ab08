"""Text files that users give: read whole, or refused in words. Nothing here waits for a writer or reads without end."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from pathlib import Path

from megatron_mosaic.errors import MosaicError

MAX_BYTES = 16 * 2**20  # real files are a thousand times smaller; a longer one was given by mistake
_MAX_SHOWN = 200  # characters of a path

_NOT_REGULAR = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a FIFO (a pipe)",
    stat.S_IFCHR: "a character device",
    stat.S_IFBLK: "a block device",
    stat.S_IFSOCK: "a socket",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class FileKind:
    """What a file is to its reader, who must act where it cannot be read, and the way out where there is none."""

    what: str  # "a plan file"
    error: type[MosaicError]
    fix: str
    max_bytes: int = MAX_BYTES


def read_text_file(path: str | Path, kind: FileKind) -> str:
    """The UTF-8 text of a regular file (or of a link to one), lines ending in `\\n`, without a byte order mark.

    The error of the kind for whatever else the path names; a device or a FIFO is not opened.
    """
    try:
        found, data = _read_start(path, kind.max_bytes + 1)
    except FileNotFoundError as error:
        got = f"a link to {os.readlink(path)!r}, which is not there" if os.path.islink(path) else "no such file"
        raise kind.error(show_path(path), got=got, expected=kind.what, fix=kind.fix) from error
    except OSError as error:
        got = error.strerror or str(error)
        raise _refusal(path, kind, got=got, fix="check the path and its permissions") from error
    except ValueError as error:  # a NUL in the path, or what no file system can encode
        raise _refusal(path, kind, got="a path that cannot be one", fix="correct the path") from error
    if not stat.S_ISREG(found.st_mode):
        what = _NOT_REGULAR.get(stat.S_IFMT(found.st_mode), "no regular file")
        raise _refusal(path, kind, got=what, fix="give the path of a regular file")
    if len(data) > kind.max_bytes:
        got, most = f"{max(found.st_size, len(data))} bytes", f"{kind.what}, of at most {kind.max_bytes} bytes"
        raise kind.error(show_path(path), got=got, expected=most, fix="check the path")
    return _decode(path, data, kind)


def show_path(path: str | Path) -> str:
    """The path as messages print it: a long one is cut, what no terminal should see is escaped."""
    text = str(path) if str(path).isprintable() else repr(str(path))
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}..."


def _read_start(path: str | Path, num_bytes: int) -> tuple[os.stat_result, bytes]:
    """What the path names, and the first bytes of a regular file; some, like those of /proc, do not tell their size."""
    found = os.stat(path)
    if not stat.S_ISREG(found.st_mode):
        return found, b""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a FIFO may stand there by now
    with os.fdopen(descriptor, "rb") as file:
        return os.fstat(descriptor), file.read(num_bytes)


def _decode(path: str | Path, data: bytes, kind: FileKind) -> str:
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        got = f"byte 0x{data[error.start]:02x} in line {data.count(b'\n', 0, error.start) + 1}, which is not UTF-8"
        raise _refusal(path, kind, got=got, fix="save it as UTF-8") from error
    if (zero := text.find("\0")) >= 0:
        got = f"a NUL byte in line {text.count('\n', 0, zero) + 1}"
        raise _refusal(path, kind, got=got, fix="remove it: text has none")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _refusal(path: str | Path, kind: FileKind, *, got: str, fix: str) -> MosaicError:
    return kind.error(show_path(path), got=got, expected=f"{kind.what}, a readable text file", fix=fix)
