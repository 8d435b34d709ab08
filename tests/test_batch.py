"""Who works on which item: everything once, evenly, and the same for every observer."""

from itertools import chain

from hypothesis import given
from hypothesis import strategies as st

from megatron_mosaic.batch import assign_items, split_evenly
from megatron_mosaic.plan import Layout
from tests.cases import make_plan, plans


@st.composite
def batches(draw: st.DrawFn):
    """A plan and the items per sample of one global microbatch."""
    plan = draw(plans())
    num_samples = plan.micro_batch_size * plan.modules["llm"].layout.dp
    items = st.lists(st.integers(0, 3), min_size=num_samples, max_size=num_samples)
    return plan, {"vision": draw(items), "llm": [1] * num_samples, "generator": draw(items)}


def test_table_of_the_docstrings_batch() -> None:
    """By hand: samples 0-3 with 1, 2, 0, 1 images on two backbone lanes; vision has three lanes."""
    plan = make_plan(
        {"vision": ("0-2", Layout(dp=3)), "llm": ("0-3", Layout(tp=2, dp=2)), "generator": ("3", Layout())},
        micro_batch_size=2,
    )
    counts = {"vision": [1, 2, 0, 1], "llm": [1, 1, 1, 1], "generator": [0, 0, 0, 0]}
    assignment = assign_items(plan, "llm", counts)
    assert assignment.lanes == {"vision": ((0,), (1,), (2, 3)), "llm": ((0, 1), (2, 3)), "generator": ((),)}
    assert assignment.owned["vision"] == ((0, 1, 2), (3,))
    assert assignment.held_by("llm", "vision", "llm") == ((0, 1, 2), (3,))
    assert assignment.held_by("vision", "vision", "llm") == ((0,), (1,), (2, 3))


@given(batches())
def test_every_item_has_one_lane_and_one_owner(case) -> None:
    plan, counts = case
    assignment = assign_items(plan, "llm", counts)
    for name, per_sample in counts.items():
        assert list(chain(*assignment.lanes[name])) == list(range(sum(per_sample)))
        assert list(chain(*assignment.owned[name])) == list(range(sum(per_sample)))
        assert len(assignment.lanes[name]) == plan.modules[name].layout.dp
        sizes = [len(items) for items in assignment.lanes[name]]
        assert max(sizes) - min(sizes) <= 1


@given(batches())
def test_an_item_is_owned_by_the_lane_of_its_sample(case) -> None:
    plan, counts = case
    assignment = assign_items(plan, "llm", counts)
    for name, per_sample in counts.items():
        sample_of = [sample for sample, count in enumerate(per_sample) for _ in range(count)]
        for lane, items in enumerate(assignment.owned[name]):
            assert {sample_of[item] for item in items} <= set(assignment.lanes["llm"][lane])
    assert {len(samples) for samples in assignment.lanes["llm"]} == {plan.micro_batch_size}


@given(st.integers(0, 50), st.integers(1, 9))
def test_split_evenly(num_items, num_lanes) -> None:
    blocks = split_evenly(num_items, num_lanes)
    assert list(chain(*blocks)) == list(range(num_items))
    assert len(blocks) == num_lanes
    assert {len(block) for block in blocks} <= {num_items // num_lanes, -(-num_items // num_lanes)}
