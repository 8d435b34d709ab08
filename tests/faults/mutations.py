"""Random damage to what users write: YAML and schedule text (bytes, lines, tokens, keys, values) and override words.

sound input --mutate_file / mutate_words--> input that is mostly wrong; the same `rng` state gives the same damage
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from typing import Any

import yaml

# Around every limit that is stated, and what overflows, rounds or loops. No number that is legal and large: it makes a
# search long, which is no fault of its reader.
NUMBERS: tuple[Any, ...] = (
    0, 1, 2, 3, 7, 64, -1, 2**20 + 1, 2**31, 2**63, 10**30, 10**400, 0.5, 1.0, -0.0, 1.5, 1e-9, 1e-320, 1e18, 1e19,
    1e300, 1e308, -1e308, float("inf"), float("-inf"), float("nan"),
)  # fmt: skip
PLAUSIBLE: tuple[Any, ...] = (
    1, 2, 4, 8, 16, 32, 3, 6, 12, 0.25, 0.5, 0.9, 1.0, 2.0, 1e-6, 1e-3, 1e4, 1e9, True, False,
)  # fmt: skip
TEXTS = (
    "", " ", "\0", "\n", "x" * 300, "é", "٤", "\u202e", "\ud7ff\ue000", "1", "1e3", "0-3", "null", "[", "~", "a.b",
    "%s", "${x}", "full", "whole", "encoder", "h100_sxm", "fp8", "interleaved",
)  # fmt: skip
OTHERS: tuple[Any, ...] = (None, True, False, [], {}, [[]], [1, 2], {"a": 1}, {1: {2: 3}})
TOKENS = (
    "&a", "*a", "<<: *a", "? ", "- ", ": ", "{", "}", "[", "]", "!!int ", "!!set ", "!!binary ", "!x ", "|\n", ">\n",
    "#", "---\n", "...\n", "%TAG ! x\n", "'", '"', "\\", "\t", "\r", "\ufeff", "\u2028", "1:30", "0x", "1_0", "=", "@",
    "2026-13-45", "[" * 60, "{a: " * 60, "9" * 5000, "&b [*b]", "? [*a]\n", "~", "<<",
)  # fmt: skip
ODD_WORDS = (
    "~model=3", "~model", "+x=1", "++x=1", "+++search.max_tp=1", "hydra.run.dir=x", "+hydra.verbose=true", "=", "=1",
    "x", "", "hydra/launcher=basic", "model@x=vlm_7b", "+model@x=vlm_7b", "model=${oc.env:HOME}", "model=???",
    "search=null", "search.max_tp=${oc.env:HOME}", "search.max_tp=$\\{oc.env\\:HOME\\}", "search.max_tp=1,2",
    "search.max_tp=range(1,9)", "search.max_tp=glob(*)", "search.max_tp=[", "search.max_tp={a:", "search.max_tp='",
    "search.max_tp=" + "9" * 5000, "search.max_tp=" + "[" * 3000, "search.max_tp=[" + "1," * 900 + "1]",
    "search.max_tp=٤", "search.max_tp=4\n", "search." + "a" * 300 + "=1", "search.max_tp.x=1", "model=/dev/zero",
    "cluster.gpu=/dev/zero.yaml", "é=1", "cluster.gpu=.yaml", "model.edges.0.width=3", "model.edges.9.width=3",
    "model.edges.0=null", "model.modules.llm=null", "cluster.kind=local", "cluster.kind=gpu", "workload.training=null",
    "--frob", "-x", "--profile", "--out=",
)  # fmt: skip
_TOWER = "t0: &t0 [1,1,1,1,1,1,1,1,1,1]\n" + "".join(
    f"t{i}: &t{i} [{','.join([f'*t{i - 1}'] * 10)}]\n" for i in range(1, 12)
)
_MERGES = "m0: &m0 {a: 1}\n" + "".join(f"m{i}: &m{i} {{<<: [*m{i - 1}, *m{i - 1}]}}\n" for i in range(1, 30))
BOMBS = (
    _TOWER, _MERGES, _TOWER + "? *t11\n: 1\n", "y: &y {<<: *y}\n", "? &i [*i]\n: 1\n", "z: 1" + ":1" * 100_000 + "\n",
    "m: &m {a: 1}\nn: {" + ", ".join(["<<: *m"] * 20_000) + "}\n", "".join(f"k{i}: 1\n" for i in range(300_000)),
)  # fmt: skip


def mutate_file(rng: random.Random, text: str) -> bytes:
    """Damaged text of a file: one to three mutations of its bytes and lines or, where it is YAML, of its values."""
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        text = rng.choice((_change_value, _change_value, _change_value, *_TEXT_MUTATIONS))(rng, text)
    data = text.encode("utf-8", "surrogatepass")
    return _flip_bytes(rng, data) if rng.random() < 0.1 else data


def mutate_words(rng: random.Random, words: list[str], keys: list[str]) -> list[str]:
    """Damaged override words: some of `keys` set to odd values, words cut, doubled, dropped or made of odd tokens."""
    words = list(words)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        words = rng.choice(_WORD_MUTATIONS)(rng, words, keys)
    return words


def _set_key(rng: random.Random, words: list[str], keys: list[str]) -> list[str]:
    return [*words, f"++{rng.choice(keys)}={rng.choice(PLAUSIBLE)}"]


def _set_key_oddly(rng: random.Random, words: list[str], keys: list[str]) -> list[str]:
    value = rng.choice(rng.choice((NUMBERS, NUMBERS, TEXTS, OTHERS)))
    text = yaml.safe_dump(value, default_flow_style=True).split("\n")[0] if rng.random() < 0.3 else str(value)
    return [*words, rng.choice(("", "", "+", "++", "~")) + f"{rng.choice(keys)}={text}"]


def _set_odd_key(rng: random.Random, words: list[str], keys: list[str]) -> list[str]:
    return [*words, f"{_insert(rng, rng.choice(keys))}={rng.choice(PLAUSIBLE)}"]


def _add_odd_word(rng: random.Random, words: list[str], keys: list[str]) -> list[str]:
    return [*words, rng.choice(ODD_WORDS)]


def _damage_word(rng: random.Random, words: list[str], keys: list[str]) -> list[str]:
    if not words:
        return words
    at = rng.randrange(len(words))
    return [*words[:at], *rng.choice(([], [_truncate(rng, words[at])], [_insert(rng, words[at])])), *words[at + 1 :]]


_WORD_MUTATIONS = (
    _set_key, _set_key, _set_key, _set_key_oddly, _set_key_oddly, _set_odd_key, _add_odd_word, _damage_word,
)  # fmt: skip


def _change_value(rng: random.Random, text: str) -> str:
    """One key or value of the YAML text changed; where it is none, one line."""
    if "*" in text or len(text) > 200_000:  # YAML's own reader hangs on what `_append_bomb` wrote
        return rng.choice(_TEXT_MUTATIONS)(rng, text)
    try:
        data = yaml.load(text, Loader=yaml.CSafeLoader)
        places = list(_places(data))
    except (yaml.YAMLError, ValueError, RecursionError, TypeError, AttributeError, ArithmeticError):
        return rng.choice(_TEXT_MUTATIONS)(rng, text)
    if not places:
        return _insert(rng, text)
    holder, key = rng.choice(places)
    _VALUE_MUTATIONS[rng.randrange(len(_VALUE_MUTATIONS))](rng, holder, key, places)
    try:
        return yaml.safe_dump(data, sort_keys=False, default_flow_style=None, width=200)
    except (yaml.YAMLError, RecursionError, ValueError, TypeError):
        return text[: len(text) // 2]


def _places(value: Any, seen: tuple[int, ...] = ()) -> Iterator[tuple[Any, Any]]:
    """(container, key) of everything inside."""
    if id(value) in seen or not isinstance(value, dict | list):
        return
    for key in value if isinstance(value, dict) else range(len(value)):
        yield value, key
        yield from _places(value[key], (*seen, id(value)))


def _delete(rng: random.Random, holder: Any, key: Any, places: list[tuple[Any, Any]]) -> None:
    del holder[key]


def _rename(rng: random.Random, holder: Any, key: Any, places: list[tuple[Any, Any]]) -> None:
    if isinstance(holder, dict):
        value = holder.pop(key)
        holder[rng.choice((f"{key}x", str(key)[:-1], str(key).upper(), "", 0, None, "é", key))] = value


def _set_number(rng: random.Random, holder: Any, key: Any, places: list[tuple[Any, Any]]) -> None:
    holder[key] = rng.choice(NUMBERS)


def _set_plausible(rng: random.Random, holder: Any, key: Any, places: list[tuple[Any, Any]]) -> None:
    holder[key] = rng.choice(PLAUSIBLE)


def _set_other(rng: random.Random, holder: Any, key: Any, places: list[tuple[Any, Any]]) -> None:
    holder[key] = copy.deepcopy(rng.choice((*OTHERS, *TEXTS)))


def _scale(rng: random.Random, holder: Any, key: Any, places: list[tuple[Any, Any]]) -> None:
    value = holder[key]
    if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300:
        holder[key] = rng.choice((2 * value, value // 2, value + 1, value - 1, -value, float(value), str(value)))
    elif isinstance(value, bool):
        holder[key] = not value


def _nest(rng: random.Random, holder: Any, key: Any, places: list[tuple[Any, Any]]) -> None:
    value = holder[key]
    for _ in range(rng.choice((1, 2, 60))):
        value = rng.choice(([value], {"a": value}))
    holder[key] = value


def _swap(rng: random.Random, holder: Any, key: Any, places: list[tuple[Any, Any]]) -> None:
    other, other_key = rng.choice(places)
    holder[key], other[other_key] = copy.deepcopy(other[other_key]), copy.deepcopy(holder[key])


def _graft(rng: random.Random, holder: Any, key: Any, places: list[tuple[Any, Any]]) -> None:
    other, other_key = rng.choice(places)
    if isinstance(holder, dict):
        holder[rng.choice(("x", other_key))] = copy.deepcopy(other[other_key])


def _share(rng: random.Random, holder: Any, key: Any, places: list[tuple[Any, Any]]) -> None:
    other, other_key = rng.choice(places)  # written with an anchor and an alias, sometimes inside of itself
    holder[key] = other[other_key]


_VALUE_MUTATIONS = (
    _scale, _scale, _scale, _set_plausible, _set_plausible, _set_plausible, _set_number, _set_number, _set_other,
    _delete, _rename, _nest, _swap, _graft, _share,
)  # fmt: skip


def _insert(rng: random.Random, text: str) -> str:
    at = rng.randrange(len(text) + 1)
    return text[:at] + rng.choice((*TOKENS, *TEXTS)) + text[at:]


def _truncate(rng: random.Random, text: str) -> str:
    return text[: rng.randrange(len(text) + 1)]


def _drop_line(rng: random.Random, text: str) -> str:
    lines = text.splitlines(keepends=True) or [""]
    del lines[rng.randrange(len(lines))]
    return "".join(lines)


def _double_line(rng: random.Random, text: str) -> str:
    lines = text.splitlines(keepends=True) or [""]
    at = rng.randrange(len(lines))
    return "".join([*lines[: at + 1], lines[at] * rng.choice((1, 1, 50)), *lines[at + 1 :]])


def _swap_lines(rng: random.Random, text: str) -> str:
    lines = text.splitlines(keepends=True) or [""]
    a, b = rng.randrange(len(lines)), rng.randrange(len(lines))
    lines[a], lines[b] = lines[b], lines[a]
    return "".join(lines)


def _swap_tokens(rng: random.Random, text: str) -> str:
    words = text.split(" ")
    a, b = rng.randrange(len(words)), rng.randrange(len(words))
    words[a], words[b] = words[b], words[a]
    return " ".join(words)


def _replace_number(rng: random.Random, text: str) -> str:
    at = [index for index, letter in enumerate(text) if letter.isdigit()]
    if not at:
        return text
    index = rng.choice(at)
    return text[:index] + str(rng.choice(NUMBERS)) + text[index + 1 :]


def _append_bomb(rng: random.Random, text: str) -> str:
    return text + "\n" + rng.choice(BOMBS)


_TEXT_MUTATIONS: tuple[Callable[[random.Random, str], str], ...] = (
    _insert, _insert, _truncate, _drop_line, _double_line, _swap_lines, _swap_tokens, _replace_number, _append_bomb,
)  # fmt: skip


def _flip_bytes(rng: random.Random, data: bytes) -> bytes:
    damaged = bytearray(data)
    for _ in range(rng.choice((1, 4))):
        if damaged:
            damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
    return bytes(damaged)
