"""YAML, read strictly: no key twice, no nesting that ends the process, no error but YAML's own."""

import pytest
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from megatron_mosaic.plan.yaml_text import describe_violation, describe_yaml_error, lines_of_keys, parse_yaml


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid")
    count: int = Field(strict=True, ge=1, le=9)
    text: str


def test_reads_what_safe_load_reads():
    text = "a: &x {b: 1, c: [1.5, yes]}\nd: {<<: *x, b: 2}\n1: one\n"
    assert parse_yaml(text) == yaml.safe_load(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3\n", "the key 'a' stands twice in \"<unicode string>\", line 3, column 1"),
        ("m:\n  a: {x: 1,\n    x: 2}\n", "the key 'x' stands twice in \"<unicode string>\", line 3, column 5"),
        ("1: a\n'1': b\n", "the key '1' stands twice"),
        ("[" * 100_000, 'nested deeper than 50 levels in "<unicode string>", line 1, column 51'),
        ("{a: " * 100_000, "nested deeper than 50"),
        ("a: " + "9" * 5000, "cannot be read"),
        ("a: 2026-99-99", "month must be in 1..12"),
        ("a: !!bool maybe", "cannot be read"),
        ("a: [1", "line 1"),
        ("? [a]\n: 2", "unhashable"),
    ],
)
def test_refuses(text, message):
    with pytest.raises(yaml.YAMLError) as caught:
        parse_yaml(text)
    assert message in describe_yaml_error(caught.value)


@pytest.mark.parametrize(
    ("data", "parts"),
    [
        (
            {"count": 0, "text": "x", "more": 1},
            {
                "where": "file: count",
                "got": "0",
                "expected": "Input should be greater than or equal to 1",
                "fix": "correct the value; also wrong: more",
            },
        ),
        (
            {"count": 1},
            {"where": "file: text", "got": "nothing", "expected": "this key to be present", "fix": "add text"},
        ),
        (
            {"count": 1, "text": "x", "txt": 1},
            {
                "where": "file: txt",
                "got": "1",
                "expected": "a key of it",
                "fix": "remove the key or correct its spelling",
            },
        ),
    ],
)
def test_violations_in_words(data, parts):
    with pytest.raises(ValidationError) as caught:
        _Model.model_validate(data)
    assert describe_violation(caught.value, where="file: ", known="a key of it") == parts


def test_a_huge_value_is_not_printed_whole():
    doubled = [1]
    for _ in range(40):  # shared lists, as YAML's aliases make them: printed, a million million numbers
        doubled = [doubled, doubled]
    for value in ("x" * 100_000, doubled, 10**5000):
        with pytest.raises(ValidationError) as caught:
            _Model.model_validate({"count": value, "text": "x"})
        assert len(describe_violation(caught.value, known="")["got"]) < 20_000


def test_lines_of_keys():
    text = "a: 1\nb: {c: 2,\n  d: {1: 3}}\n\n'e f':\n  - g: 4\nh: &x\n  i: *x\nj: *x\n"
    expected = {("a",): 1, ("b",): 2, ("b", "c"): 2, ("b", "d"): 3, ("b", "d", "1"): 3, ("e f",): 5, ("h",): 7}
    assert lines_of_keys(text) == expected | {("h", "i"): 8, ("j",): 9}
    assert lines_of_keys("") == lines_of_keys("- 1") == {}
