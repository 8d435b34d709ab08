"""Histograms in model files: read, written, refused."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_mosaic.errors import ConfigError
from megatron_mosaic.plan.tasks.histogram import Histogram
from megatron_mosaic.plan.workload_file import format_workload, load_workload_file

SIZES = "num_layers: 2, hidden_size: 8, num_heads: 2, ffn_hidden_size: 8"
MODEL = f"""
name: toy
global_batch_size: 8
modules:
  vision: {{{{role: encoder, {SIZES}, tokens_per_item: {{tokens}}, items_per_sample: {{items}}, merge_tokens: 4}}}}
  llm: {{{{role: backbone, {SIZES}, tokens_per_item: 8{{llm}}}}}}
"""


def _load(tmp_path, *, tokens="16", items="1", llm=""):
    path = tmp_path / "model.yaml"
    path.write_text(MODEL.format(tokens=tokens, items=items, llm=llm))
    return load_workload_file(path)


def test_means_are_those_of_the_counts(tmp_path):
    vision = _load(tmp_path, items="{0: 1, 1: 2, 3: 1}", tokens="{16: 1, 64: 2}").by_name["vision"]
    assert vision.items_per_sample == pytest.approx((0 + 2 + 3) / 4)
    assert vision.tokens_per_item == (16 + 2 * 64) / 3
    assert vision.items_histogram.bins == ((0, 0.25), (1, 0.5), (3, 0.25))
    odd = _load(tmp_path, tokens="{16: 1, 20: 1}").by_name["vision"]
    assert odd.tokens_per_item == 16  # 18, to whole rows of 4 tokens; halves to even


@given(st.dictionaries(st.integers(1, 50), st.floats(1e-3, 1e6), min_size=1, max_size=8))
def test_a_file_of_a_workload_loads_as_it(tmp_path_factory, counts):
    tmp_path = tmp_path_factory.mktemp("models")
    tokens = {4 * value: weight for value, weight in counts.items()}
    workload = _load(tmp_path, items=counts, tokens=tokens)
    (tmp_path / "again.yaml").write_text(format_workload(workload))
    assert load_workload_file(tmp_path / "again.yaml") == workload


def test_the_digest_is_that_of_the_means(tmp_path):
    assert _load(tmp_path, items="{0: 1, 2: 1}").digest == _load(tmp_path).digest


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"items": "{0: 1}"}, r"items_per_sample.*some samples must bring an item"),
        ({"items": "{-1: 1}"}, r"items_per_sample.*-1"),
        ({"items": "{1: 0}"}, r"items_per_sample"),
        ({"items": "{1: .inf}"}, r"items_per_sample"),
        ({"items": "{}"}, r"items_per_sample"),
        ({"items": "{a: 1}"}, r"items_per_sample.*a"),
        ({"tokens": "{6: 1, 16: 1}"}, r"tokens_per_item.*multiples of merge_tokens 4"),
        ({"tokens": "{0: 1}"}, r"tokens_per_item"),
        ({"llm": ", items_per_sample: {1: 1}"}, r"llm.*items_per_sample.*1 for the backbone"),
    ],
)
def test_refuses(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=f"(?s){message}"):
        _load(tmp_path, **changes)


@pytest.mark.parametrize("bins", [((2, 0.5), (1, 0.5)), ((1, 0.5),), ((1, 0.0), (2, 1.0)), ((-1, 1.0),)])
def test_a_histogram_is_in_order_and_whole(bins):
    with pytest.raises(ConfigError):
        Histogram(bins)
