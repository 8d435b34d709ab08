"""Made-up data: the same for everybody, within bounds, and with the workload's mean."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_mosaic.any2any.synthetic import SyntheticDataset, collate
from megatron_mosaic.errors import ConfigError
from tests.numerics.acceptance_cases import ONE, WEB
from tests.worlds import workloads


def dataset(workload=WEB, split="train", seed=1, num_samples=400):
    return SyntheticDataset(split, workload=workload, num_samples=num_samples, seed=seed)


def test_a_sample_is_a_function_of_seed_split_and_number():
    def differs(a, b):
        return any(a[key].shape != b[key].shape or (a[key] != b[key]).any() for key in a)

    first = dataset()[7]
    assert not differs(first, dataset(num_samples=8)[7])
    assert differs(first, dataset()[8]) and differs(first, dataset(seed=2)[7])
    assert differs(first, dataset(split="valid")[7])
    with pytest.raises(IndexError):
        dataset(num_samples=7)[7]


@settings(deadline=None, max_examples=40)
@given(workloads(), st.integers(0, 1000))
def test_links_stay_in_their_items_and_never_end_on_one_token(workload, first):
    data = dataset(workload, num_samples=first + 3)
    batch = collate(workload)([data[first + i] for i in range(3)])
    tokens = {workload.backbone.name: torch.full((3,), 64)}
    tokens |= {m.name: batch[f"{m.name}/tokens"] for m in workload.modules if m.name not in tokens}
    for edge in workload.edges:
        taken = set()
        for source, begin, target, start, rows in batch[f"{edge.source}>{edge.target}"].T.tolist():
            assert (
                rows >= 1
                and begin + rows <= tokens[edge.source][source]
                and start + rows <= tokens[edge.target][target]
            )
            places = {(target, start + row) for row in range(rows)}
            assert taken.isdisjoint(places)
            taken |= places


def test_rows_of_different_encoders_never_overwrite_each_other():
    data = dataset()
    for idx in range(50):
        places = []
        for source in ("image", "audio"):
            links = data[idx][f"{source}>llm"].T.tolist()
            places += [start + row for _, _, _, start, rows in links for row in range(rows)]
        assert len(places) == len(set(places))


@pytest.mark.parametrize("mean", [0.1, 1.0, 2.5])
def test_items_have_the_workloads_mean(mean):
    modules = tuple(replace(m, items_per_sample=mean if m.name == "image" else 1.0) for m in ONE.modules)
    data = dataset(replace(ONE, modules=modules))
    counts = [len(data[i]["image/tokens"]) for i in range(400)]
    error = (mean / 400) ** 0.5  # of the mean, at most: a binomial's variance is below its mean
    assert abs(np.mean(counts) - mean) < 5 * error


@settings(deadline=None, max_examples=20)
@given(st.lists(st.integers(0, 399), min_size=1, max_size=4), st.lists(st.integers(0, 399), min_size=1, max_size=4))
def test_a_batch_of_batches_is_one_batch(first, second):
    """What a unit of two microbatches collates is the two after each other, items counted on."""
    data, make = dataset(), collate(WEB)
    one, two = make([data[i] for i in first]), make([data[i] for i in second])
    both = make([data[i] for i in [*first, *second]])
    for key in ("tokens", "labels", "loss_mask", "image/values", "generator/targets"):
        assert torch.equal(both[key], torch.cat([one[key], two[key]]))
    shift = torch.tensor([len(one["image/tokens"]), 0, len(first), 0, 0])
    assert torch.equal(both["image>llm"], torch.cat([one["image>llm"], two["image>llm"] + shift[:, None]], dim=1))


def test_rows_that_do_not_fit_the_backbone_are_refused():
    edges = (replace(ONE.edges[0], width=8),)
    with pytest.raises(ConfigError, match=r"edge image->llm: width\n.*got: +8"):
        dataset(replace(ONE, edges=edges))
