"""YAML text -> plain values, strictly; and what is wrong with values that break a schema, in words.

YAML's own reader lets the last of two equal keys win, its C parser dies of deep nesting, and a page of aliases may
stand for a million million values: all refused here, with the line, before a value is made.
"""

from __future__ import annotations

import itertools
import re
import reprlib
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from megatron_mosaic.text_file import FileKind

MAX_COUNT = 2**20  # of ranks, degrees, samples, layers: above it a number is a slip, and a loop over it would not end
MAX_SECONDS = 1e9  # thirty years
MAX_AMOUNT = 1e18  # of bytes or operations, also per second: far above any device, far below what overflows
MAX_ALIASES = 1000
MAX_NODES = 200_000  # keys, values and sections, where an alias counts as all that it stands for
_MAX_DEPTH = 50
# A choice may be written in several forms, a name alone or a section. pydantic puts the form it took into the path of
# an error, where the file has nothing.
FORM_NAME, FORM_SECTION = "~name", "~section"
_FORMS = re.compile(r"~[a-z_]+")
_MAX_DIRECTIVES = 10  # lines that start with %: the parser compares each with all others
_MAX_MESSAGE = 500  # characters; YAML's own reader quotes names and tags whole
_MAX_NUMBER = 400  # characters; sums of 1:30:15 and the like take time with their square

_FastLoader: type[Any] = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_SHORT = reprlib.Repr(maxstring=200, maxother=200, maxlong=200)


class Schema(BaseModel):
    """What stands in a file or in overrides: known keys, finite numbers."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class _StrictLoader(_FastLoader):  # type: ignore[misc]  # its base depends on the installation
    def construct_document(self, node: yaml.Node) -> Any:
        self._refuse_repeated_keys(node, set())
        return super().construct_document(node)

    def _refuse_repeated_keys(self, node: yaml.Node, seen: set[int]) -> None:
        """Before the reader merges what `<<` names into its mappings, where keys may well stand twice."""
        if isinstance(node, yaml.ScalarNode) or id(node) in seen:
            return
        seen.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            for value in node.value:
                self._refuse_repeated_keys(value, seen)
            return
        keys = set()
        for key_node, value in node.value:
            key = self._key_text(key_node)
            if key in keys:
                raise _error(f"the key {_shorten(key)} stands twice", key_node.start_mark)
            keys.add(key)
            self._refuse_repeated_keys(value, seen)

    def _key_text(self, node: yaml.Node) -> str:
        """A key as text: 1 and "1" are one key of a schema."""
        if not isinstance(node, yaml.ScalarNode):
            raise _error("a key that is a list or a section", node.start_mark)
        return "<<" if node.tag == "tag:yaml.org,2002:merge" else str(self.construct_object(node, deep=True))

    def construct_number(self, node: yaml.ScalarNode) -> int | float:
        """An integer or a float, by the reader's own rules."""
        if len(node.value) > _MAX_NUMBER:
            raise _error(f"a number of {len(node.value)} characters", node.start_mark)
        read = self.construct_yaml_int if node.tag.endswith(":int") else self.construct_yaml_float
        number: int | float = read(node)
        return number


for _tag in ("int", "float"):
    _StrictLoader.add_constructor(f"tag:yaml.org,2002:{_tag}", _StrictLoader.construct_number)


def parse_yaml(text: str) -> Any:
    """The plain values in the text. yaml.YAMLError on anything else, with the line."""
    _validate_directives(text)
    try:
        _validate_size(text)
        return yaml.load(text, Loader=_StrictLoader)
    except (RecursionError, ValueError, LookupError, AttributeError, TypeError, ArithmeticError) as error:
        # what YAML's own reader raises for a date without a month, `!!bool maybe`, `!!set [1]`, `1:1:...:1.5`
        raise yaml.YAMLError(f"a value that cannot be read: {error}") from error


def parse_section(text: str, kind: FileKind, *, where: str) -> dict[Any, Any]:
    """The mapping that the text of a file of this kind is; the kind's error names the file, `where`, and the line."""
    try:
        data = parse_yaml(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        raise kind.error(
            f"{where}:{mark.line + 1}" if mark else where,
            got=describe_yaml_error(error),
            expected=f"{kind.what} in valid YAML",
            fix=f"correct it there, or {kind.fix}",
        ) from error
    if not isinstance(data, dict):
        got = "nothing" if data is None else type(data).__name__
        raise kind.error(where, got=got, expected=f"{kind.what}: keys with values", fix=kind.fix)
    return data


def _validate_directives(text: str) -> None:
    found = itertools.islice(re.finditer(r"^%", text, re.MULTILINE), _MAX_DIRECTIVES, None)
    if one_more := next(found, None):
        line = text.count("\n", 0, one_more.start()) + 1
        raise yaml.YAMLError(f"more than {_MAX_DIRECTIVES} directives (%) in line {line}")


def _validate_size(text: str) -> None:
    """YAMLError where sections are too deep, or aliases or nodes too many. No node is made."""
    sizes: dict[str | None, int] = {}  # anchor -> nodes of what it names
    opened: list[tuple[str | None, int]] = []  # around this event: anchor, nodes before it
    nodes = aliases = 0
    for event in yaml.parse(text, Loader=_FastLoader):
        if isinstance(event, yaml.AliasEvent):
            aliases += 1
            if any(anchor == event.anchor for anchor, _ in opened):
                raise _error(f"the alias *{event.anchor} stands inside of what it names", event.start_mark)
            nodes += sizes.get(event.anchor, 1)
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = opened.pop()
            if anchor:
                sizes[anchor] = nodes - before
        elif isinstance(event, yaml.NodeEvent):
            if isinstance(event, yaml.CollectionStartEvent):
                opened.append((event.anchor, nodes))
            nodes += 1
        for count, most, what in (
            (len(opened), _MAX_DEPTH, "nested deeper than {} levels"),
            (aliases, MAX_ALIASES, "more than {} aliases"),
            (nodes, MAX_NODES, "more than {} values, each alias counted as all that it stands for"),
        ):
            if count > most:
                raise _error(what.format(most), event.start_mark)


def _error(problem: str, mark: Any) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=mark)


def lines_of_keys(text: str) -> dict[tuple[str, ...], int]:
    """Path of a key in nested mappings -> its line, from 1. For text that `parse_yaml` reads; of what stands behind
    several names (`&x`, `*x`), the keys are listed below the first."""
    lines: dict[tuple[str, ...], int] = {}
    seen: set[int] = set()  # a mapping may hold itself, or the same one many times

    def visit(node: yaml.Node | None, path: tuple[str, ...]) -> None:
        if not isinstance(node, yaml.MappingNode) or id(node) in seen:
            return
        seen.add(id(node))
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode):
                lines[*path, key.value] = key.start_mark.line + 1
                visit(value, (*path, key.value))

    visit(yaml.compose(text, Loader=_FastLoader), ())
    return lines


def describe_yaml_error(error: Exception) -> str:
    """The message on one line; a long one is cut."""
    text = " ".join(str(error).split()).replace('"<unicode string>", ', "")
    return text if len(text) <= _MAX_MESSAGE else f"{text[:_MAX_MESSAGE]}..."


def describe_violation(error: ValidationError, *, where: str = "", known: str) -> dict[str, str]:
    """The four parts of a MosaicError: the first violation in full, the others by path. `known`: what keys may be."""
    first, *rest = error.errors()
    path = _path(first["loc"])
    expected, got, fix = first["msg"], _shorten(first["input"]), "correct the value"
    if first["type"] == "extra_forbidden":
        expected, fix = known, "remove the key or correct its spelling"
    elif first["type"] == "missing":
        expected, got, fix = "this key to be present", "nothing", f"add {path}"
    elif first["type"] == "model_type":
        expected, fix = "a section: keys with values", "write it as in the files under conf/"
    if rest:
        fix += "; also wrong: " + ", ".join(_path(other["loc"]) for other in rest[:5])
    return {"where": where + path, "got": got, "expected": expected, "fix": fix}


def _path(location: tuple[int | str, ...]) -> str:
    return ".".join(str(part) for part in location if not _FORMS.fullmatch(str(part)))


def _shorten(value: object) -> str:
    try:
        return _SHORT.repr(value)
    except ValueError:  # Python prints no integer of more than 4300 digits
        return "a number of thousands of digits"
