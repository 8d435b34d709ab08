"""Files of local measurements: they replace constants of a GPU type, and a wrong one is refused by line."""

from dataclasses import fields, replace

import pytest

from megatron_mosaic.config import load_task
from megatron_mosaic.cost_model.hardware.catalogue import gpu_type_names, load_gpu_type
from megatron_mosaic.cost_model.hardware.gpu_type_file import CONSTANTS, format_gpu_type_file
from megatron_mosaic.cost_model.published.constants import BOUNDS
from megatron_mosaic.errors import ConfigError

BASE = load_gpu_type("h100_sxm")
TEXT = """\
gpu_type: 1
base: h100_sxm
bandwidth_frac: 0.87
launch_s: 4.5e-6
sources:
  bandwidth_frac: a copy
  launch_s: many launches
"""


@pytest.fixture
def path(tmp_path):
    return tmp_path / "mine.yaml"


def load(path, text):
    path.write_text(text)
    return load_gpu_type(str(path))


def test_constants_are_the_fitted_ones():
    assert set(CONSTANTS) == {*BOUNDS, "interference_residual"}  # which no published step could tell
    assert set(CONSTANTS) <= {field.name for field in fields(BASE)}


def test_overrides_and_nothing_else(path):
    gpu = load(path, TEXT)
    sources = {**BASE.sources, "bandwidth_frac": "a copy", "launch_s": "many launches"}
    assert gpu == replace(BASE, name="mine.yaml", bandwidth_frac=0.87, launch_s=4.5e-6, sources=sources)


@pytest.mark.parametrize("name", CONSTANTS)
@pytest.mark.parametrize("base", gpu_type_names())
def test_each_constant_of_each_base(path, base, name):
    gpu = load(path, f"gpu_type: 1\nbase: {base}\n{name}: 0.123\nsources: {{{name}: seen}}\n")
    before = load_gpu_type(base)
    expected = replace(before, name="mine.yaml", sources={**before.sources, name: "seen"}, **{name: 0.123})
    assert gpu == expected


def test_the_base_alone(path):
    assert load(path, "gpu_type: 1\nbase: h100_sxm\n") == replace(BASE, name="mine.yaml")


def test_a_changed_file_is_read_again(path):
    assert load(path, TEXT).bandwidth_frac == 0.87
    assert load(path, TEXT.replace("0.87", "0.5")).bandwidth_frac == 0.5


def test_what_is_written_reads_back_with_five_digits(path):
    values = {name: 0.123456789 for name in CONSTANTS} | {"launch_s": 1.23456789e-6}  # YAML 1.1 wants 1.0e-06
    gpu = load(path, format_gpu_type_file("b200_sxm", values, "measured: 'today', on \"it\""))
    assert {name: getattr(gpu, name) for name in CONSTANTS} == {
        name: 0.12346 for name in CONSTANTS if name != "launch_s"
    } | {"launch_s": 1.2346e-6}
    assert {gpu.sources[name] for name in CONSTANTS} == {"measured: 'today', on \"it\""}
    assert gpu.flops_per_s == load_gpu_type("b200_sxm").flops_per_s


def test_a_plan_is_made_with_the_file(path, monkeypatch):
    words = ["model=vlm_7b", "cluster=h100_1x8"]
    path.write_text(TEXT)
    monkeypatch.chdir(path.parent)
    for place in ("mine.yaml", str(path)):
        task = load_task([*words, f"cluster.gpu={place}"])
        assert task.cluster.gpu.bandwidth_frac == 0.87
        assert task.cost_model().name.startswith("mine.yaml, ")
    assert load_task(words).cluster.gpu == BASE


@pytest.mark.parametrize(
    ("old", "new", "where", "got", "expected", "fix"),
    [
        ("0.87", "0", ":3: bandwidth_frac", "0", "or equal to 0.000001", "correct the value"),
        ("0.87", "-0.5", ":3: bandwidth_frac", "-0.5", "or equal to 0.000001", "correct the value"),
        ("4.5e-6", "2.0", ":4: launch_s", "2.0", "less than or equal to 1", "correct the value"),
        ("0.87", "87", ":3: bandwidth_frac", "87", "less than or equal to 1", "correct the value"),
        ("0.87", ".nan", ":3: bandwidth_frac", "nan", "finite number", "correct the value"),
        ("4.5e-6", ".inf", ":4: launch_s", "inf", "finite number", "correct the value"),
        ("4.5e-6", "9" * 400, ":4: launch_s", "999", "number", "correct the value"),
        ("0.87", "fast", ":3: bandwidth_frac", "'fast'", "valid number", "correct the value"),
        ("0.87", "true", ":3: bandwidth_frac", "True", "valid number", "correct the value"),
        ("0.87", "[0.87]", ":3: bandwidth_frac", "[0.87]", "valid number", "correct the value"),
        ("0.87", "", ":3: bandwidth_frac", "None", "valid number", "correct the value"),
        ("4.5e-6", "4e-6", ":4: launch_s", "'4e-6'", "valid number", "write 4.0e-06"),
        ("launch_s: 4", "launch_us: 4", ":4: launch_us", "4.5e-06", "'launch_s'", "correct its spelling"),
        ("base: h100_sxm", "base: h100_sxm\nflops_per_s: 1.0", ":3: flops_per_s", "1.0", "'base'", "remove the key"),
        ("  launch_s: many launches\n", "", ":4: launch_s", "without a source", "where it comes", "{launch_s: ...}"),
        ("many launches", "' '", ":7: sources.launch_s", "' '", "match pattern", "correct the value"),
        ("many launches", "", ":7: sources.launch_s", "None", "valid string", "correct the value"),
        ("many launches", "4", ":7: sources.launch_s", "4", "valid string", "correct the value"),
        ("  launch_s: m", "  half_depth: m", ":4: launch_s", "without a source", "where it", "launch_s"),
        ("launch_s: 4.5e-6\n", "", ":6: sources.launch_s", "without its number", "bandwidth_frac", "add launch_s"),
        ("  launch_s", "  lunch_s: x\n  launch_s", ":7: sources.lunch_s", "without its", "launch_s", "spelling"),
        ("base: h100_sxm", "base: h100", ":2: base", "h100", "'h100_sxm'", "name the GPU type"),
        ("base: h100_sxm", "base: other.yaml", ":2: base", "other.yaml", "'h100_sxm'", "name the GPU type"),
        ("base: h100_sxm\n", "", ":1: base", "nothing", "present", "add base"),
        ("gpu_type: 1", "gpu_type: 2", ":1: gpu_type", "2", "less than or equal to 1", "correct the value"),
        ("gpu_type: 1\n", "", ":1: gpu_type", "nothing", "present", "add gpu_type"),
        ("launch_s: 4.5e-6", "base: h200_sxm", ":4", "'base' stands twice", "valid YAML", "correct it there"),
        ("  launch_s: many", "  - launch_s: many", ":", "parsing", "valid YAML", "correct it there"),
        (
            "sources:",
            "sources: &s\n  launch_us: *s",
            ":6",
            "stands inside of what it names",
            "valid YAML",
            "correct it",
        ),
    ],
)
def test_refuses_by_line(path, old, new, where, got, expected, fix):
    assert TEXT.count(old) == 1
    with pytest.raises(ConfigError) as caught:
        load(path, TEXT.replace(old, new))
    error = caught.value
    assert error.where.startswith(f"{path}{where}")
    assert got in error.got
    assert expected in error.expected
    assert fix in error.fix


@pytest.mark.parametrize(
    ("text", "line"), [("", ""), ("- 1", ""), ("[1", ":2"), ("a: 1\n\x00", ""), ("[" * 100_000, ":1")]
)
def test_refuses_what_is_no_mapping(path, text, line):
    with pytest.raises(ConfigError) as caught:
        load(path, text)
    assert caught.value.where == f"{path}{line}"


def test_a_missing_file_names_the_command_and_the_bases(path):
    with pytest.raises(ConfigError) as caught:
        load_gpu_type(str(path))
    assert caught.value.where == str(path)
    assert caught.value.got == "no such file"
    assert "mosaic calibrate --gpu-type" in caught.value.fix
    assert "h100_sxm" in caught.value.fix


def test_what_cannot_be_read_is_refused(tmp_path):
    (tmp_path / "folder.yaml").mkdir()
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00base")
    for name in ("folder.yaml", "bytes.yaml"):
        with pytest.raises(ConfigError, match="a readable text file"):
            load_gpu_type(str(tmp_path / name))
