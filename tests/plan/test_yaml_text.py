"""YAML, read strictly: no key twice, no nesting that ends the process, no error but YAML's own."""

import pytest
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from megatron_mosaic.plan.yaml_text import Schema, describe_violation, describe_yaml_error, lines_of_keys, parse_yaml


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid")
    count: int = Field(strict=True, ge=1, le=9)
    text: str


def test_reads_what_safe_load_reads():
    text = "a: &x {b: 1, c: [1.5, yes]}\nd: {<<: *x, b: 2}\n1: one\n"
    assert parse_yaml(text) == yaml.safe_load(text)


def test_what_is_merged_may_be_overridden_wherever_it_stands():
    text = "a: &a {x: 1}\ntop: {inner: &b {<<: *a, x: 2}}\nc: {<<: *b, y: 3}\n"
    assert parse_yaml(text) == {"a": {"x": 1}, "top": {"inner": {"x": 2}}, "c": {"x": 2, "y": 3}}


def tower(link: str) -> str:
    """Thirty lines, each twice the one before it: a thousand million values."""
    return "a0: &a0 {k: 1}\n" + "".join(f"a{i}: &a{i} {link.format(f'*a{i - 1}, *a{i - 1}')}\n" for i in range(1, 31))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3\n", "the key 'a' stands twice in line 3, column 1"),
        ("m:\n  a: {x: 1,\n    x: 2}\n", "the key 'x' stands twice in line 3, column 5"),
        ("a: &a {x: 1}\nb: {<<: *a,\n  <<: *a}", "the key '<<' stands twice in line 3, column 3"),
        (tower("[{}]"), "more than 200000 values, each alias counted as all that it stands for in line 16"),
        (tower("{{<<: [{}]}}"), "more than 200000 values, each alias counted as all that it stands for in line 16"),
        (tower("[{}]") + "? *a30\n: 1\n", "more than 200000 values"),
        ("a: &a 1\nb: [" + "*a, " * 1001 + "]", "more than 1000 aliases in line 2, column 4005"),
        ("- 1\n" * 200_000, "more than 200000 values"),
        ("a: &x [1, *x]", "the alias *x stands inside of what it names in line 1, column 11"),
        ("a: &x {b: *x}", "the alias *x stands inside of what it names"),
        ("a: &x {<<: *x}", "the alias *x stands inside of what it names"),
        ("? &i [*i]\n: 1", "the alias *i stands inside of what it names"),
        ("".join(f"%TAG !a{i}! b\n" for i in range(11)) + "--- 1", "more than 10 directives (%) in line 11"),
        ("a: 1" + ":1" * 500, "a number of 1001 characters in line 1, column 4"),  # sixties: time with the square
        ("a: 1" + ":1" * 190 + ".5", "cannot be read"),
        ("a: !!set [1]", "expected a mapping node"),
        ("a: !" + "x" * 100_000, "..."),
        ("1: a\n'1': b\n", "the key '1' stands twice"),
        ("[" * 100_000, "nested deeper than 50 levels in line 1, column 51"),
        ("{a: " * 100_000, "nested deeper than 50"),
        ("a: " + "9" * 5000, "a number of 5000 characters"),
        ("a: 2026-99-99", "month must be in 1..12"),
        ("a: !!bool maybe", "cannot be read"),
        ("a: [1", "line 1"),
        ("? [a]\n: 2", "a key that is a list or a section in line 1, column 3"),
    ],
)
def test_refuses(text, message):
    with pytest.raises(yaml.YAMLError) as caught:
        parse_yaml(text)
    assert message in describe_yaml_error(caught.value)
    assert len(describe_yaml_error(caught.value)) < 1000


def test_a_page_of_aliases_may_stand_for_what_a_file_may_hold():
    shared = "".join(f"a{i}: &a{i} [{f'*a{i - 1}, ' * 10}]\n" for i in range(1, 5))
    assert sum(parse_yaml("a0: &a0 1\n" + shared)["a4"][0][0][0]) == 10


class _Numbers(Schema):
    x: float


@pytest.mark.parametrize("text", [".inf", "-.inf", ".nan", "1.0e+400"])
def test_every_number_of_a_schema_is_finite(text):
    with pytest.raises(ValidationError, match="finite number"):
        _Numbers.model_validate(parse_yaml(f"x: {text}"))


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
