"""YAML text -> plain values, strictly; and what is wrong with values that break a schema, in words.

YAML's own reader lets the last of two equal keys win, and its C parser dies of deep nesting: both are refused here.
"""

from __future__ import annotations

import re
import reprlib
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

MAX_COUNT = 2**20  # of ranks, degrees, samples, layers: above it a number is a slip, and a loop over it would not end
_MAX_DEPTH = 50
# A choice may be written in several forms, a name alone or a section. pydantic puts the form it took into the path of
# an error, where the file has nothing.
FORM_NAME, FORM_SECTION = "~name", "~section"
_FORMS = re.compile(r"~[a-z_]+")

_FastLoader: type[Any] = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_SHORT = reprlib.Repr(maxstring=200, maxother=200, maxlong=200)


class StrictModel(BaseModel):
    """A section of a file: unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class _StrictLoader(_FastLoader):  # type: ignore[misc]  # its base depends on the installation
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = str(self.construct_object(key_node, deep=True))  # as text: 1 and "1" are one key of a schema
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} stands twice", key_node.start_mark
                )
            seen.add(key)
        mapping: dict[Any, Any] = super().construct_mapping(node, deep)
        return mapping


def parse_yaml(text: str) -> Any:
    """The plain values in the text. yaml.YAMLError on anything else, with the line."""
    try:
        depth = 0
        for event in yaml.parse(text, Loader=_FastLoader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > _MAX_DEPTH:
                raise yaml.YAMLError(f"nested deeper than {_MAX_DEPTH} levels{event.start_mark}")
        return yaml.load(text, Loader=_StrictLoader)
    except (RecursionError, ValueError, LookupError, AttributeError) as error:
        # what YAML's own reader raises for a date without a month, a number of 5000 digits, `!!bool maybe`
        raise yaml.YAMLError(f"a value that cannot be read: {error}") from error


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
    """The message on one line."""
    return " ".join(str(error).split())


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
