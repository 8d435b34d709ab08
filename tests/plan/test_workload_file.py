"""Model files: what is written is read back; what is wrong is named with its file and key."""

import pytest
from hypothesis import given

from megatron_mosaic.errors import ConfigError
from megatron_mosaic.plan.workload_file import format_workload, load_workload_file
from tests.cases import WORKLOAD
from tests.worlds import workloads


@given(workloads())
def test_round_trip(tmp_path_factory, workload):
    path = tmp_path_factory.mktemp("models") / "model.yaml"
    path.write_text(format_workload(workload))
    assert load_workload_file(path) == workload


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("num_layers: 4", "num_layers: 0", r"modules\.vision\.num_layers"),
        ("num_layers: 4", "layers: 4", r"modules\.vision\."),
        ("role: encoder", "role: decoder", r"modules\.vision\.role"),
        ("source: vision", "source: visions", "visions"),
        ("name: toy", "name: [", "model.yaml"),
    ],
)
def test_refuses(tmp_path, old, new, message):
    path = tmp_path / "model.yaml"
    text = format_workload(WORKLOAD)
    assert old in text
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(ConfigError, match=message):
        load_workload_file(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match="nowhere"):
        load_workload_file(tmp_path / "nowhere.yaml")
