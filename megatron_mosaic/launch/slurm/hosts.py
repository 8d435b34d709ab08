"""Slurm's short ways to write lists of hosts and of task counts, and the address of a host."""

from __future__ import annotations

import contextlib
import itertools
import re
import socket
import subprocess
from collections.abc import Iterator

from megatron_mosaic.errors import ConfigError

_MAX_HOSTS = 100_000
_WORD = re.compile(r"(?:[^,\[\]]|\[[^\[\]]*\])+")  # commas inside brackets belong to the word
_PART = re.compile(r"\[([^\[\]]*)\]|([\w.-]+)")
_RANGE = re.compile(r"(\d+)(?:-(\d+))?")
_TASKS = re.compile(r"(\d+)(?:\(x(\d+)\))?")


def expand_hosts(text: str) -> tuple[str, ...]:
    """`gpu[01-03,7],login` -> gpu01, gpu02, gpu03, gpu7, login: Slurm's order, which is that of its node ids."""
    words = _WORD.findall(text)
    if not words or ",".join(words) != text:
        raise _malformed(text)
    return tuple(itertools.islice((host for word in words for host in _expand_word(word)), _MAX_HOSTS))


def _expand_word(word: str) -> Iterator[str]:
    parts = _PART.findall(word)
    if "".join(plain or f"[{ranges}]" for ranges, plain in parts) != word:
        raise _malformed(word)
    choices = [[plain] if plain else list(_numbers(ranges)) for ranges, plain in parts]
    return ("".join(chosen) for chosen in itertools.product(*choices))


def _numbers(ranges: str) -> Iterator[str]:
    """`01-03,7` -> 01, 02, 03, 7: as many digits as the first number has."""
    for one in ranges.split(","):
        match = _RANGE.fullmatch(one)
        if match is None or int(match[2] or match[1]) - int(match[1]) > _MAX_HOSTS:
            raise _malformed(f"[{ranges}]")
        for number in range(int(match[1]), int(match[2] or match[1]) + 1):
            yield str(number).zfill(len(match[1]))


def count_tasks(text: str) -> tuple[int, ...]:
    """`2(x3),1` -> 2, 2, 2, 1: the tasks of each node."""
    found: list[int] = []
    for one in text.split(","):
        match = _TASKS.fullmatch(one)
        if match is None:
            raise ConfigError("SLURM_STEP_TASKS_PER_NODE", got=text, expected="such as 2(x3),1", fix="start with srun")
        found += [int(match[1])] * min(int(match[2] or 1), _MAX_HOSTS)
    return tuple(found)


def find_address(host: str) -> str:
    """What other hosts reach it by: its name where that resolves, else the address that Slurm knows it by."""
    with contextlib.suppress(OSError):
        socket.getaddrinfo(host, None)
        return host
    with contextlib.suppress(OSError):
        command = ["scontrol", "show", "node", host]
        told = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
        if match := re.search(r"NodeAddr=(\S+)", told.stdout):
            return match[1]
    raise ConfigError(
        "MASTER_ADDR",
        got=f"nothing, and {host}, the first host of the job, does not resolve",
        expected="the address of the host of rank 0",
        fix="export MASTER_ADDR in the batch script",
    )


def _malformed(text: str) -> ConfigError:
    return ConfigError("list of hosts", got=text[:200], expected="such as gpu[01-03,7]", fix="start with srun")
