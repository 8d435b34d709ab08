"""Both ends of a border hold the same samples: seen in every message, and found at the first where they do not."""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from megatron_mosaic.errors import BatchError, RankFailure
from megatron_mosaic.parallel_state_ext.boundaries.fingerprints import fingerprint_samples, mark, require_same
from megatron_mosaic.parallel_state_ext.boundaries.step_map import Metadata, PlanMap, StepMap
from megatron_mosaic.parallel_state_ext.rank_view import RankView
from megatron_mosaic.parity.check import check_plan
from megatron_mosaic.runtime import step
from tests.numerics import parity_cases as cases
from tests.worlds import bring_items, plans, workloads

worlds = workloads().flatmap(lambda workload: st.tuples(st.just(workload), plans(workload)))


def marked(metadata: Metadata, number: int, salt: bytes = b"") -> Metadata:
    return Metadata(items=metadata.items, links=metadata.links, content=b"%d" % number + salt)


@given(worlds, st.integers(0, 2**32 - 1), st.data())
def test_a_message_has_one_mark_at_both_ends_and_another_where_samples_differ(world, seed, data) -> None:
    """Every message of a step, forward and back; and for one microbatch, whose samples one rank has read otherwise."""
    workload, plan = world
    rng = np.random.default_rng(seed)
    slots = plan.modules[workload.backbone.name].layout.dp
    found = [
        bring_items(workload, plan.micro_batch_size * slots, rng)
        for _ in range(plan.num_microbatches(workload.backbone.name))
    ]
    other = data.draw(st.integers(0, len(found) - 1))
    sent, received, foreign = {}, {}, {}
    for rank in range(plan.world_size):
        view = RankView.of(plan, rank, workload.edges)
        of_plan = PlanMap(view, workload)
        own = StepMap(of_plan, [marked(one, m) for m, one in enumerate(found)])
        wrong = StepMap(of_plan, [marked(one, m, b"!" * (m == other)) for m, one in enumerate(found)])
        for module in view.modules.values():
            for end in (*module.imports, *module.exports):
                for unit in range(-(-len(found) // own._unit_sizes[end.module])):
                    for peer in own.peers(end, unit):
                        key = (end.source, end.target, *end.in_order(unit, peer))
                        for part, one in zip(own.sends(end, unit, peer), own.marks_sent(end, unit, peer), strict=True):
                            sent[*key, end.is_source, rank, part.rank] = one
                        pairs = zip(own.receives(end, unit, peer), own.marks_received(end, unit, peer), strict=True)
                        for (part, one), strange in zip(pairs, wrong.marks_received(end, unit, peer), strict=True):
                            message = (*key, not end.is_source, part.rank, rank)
                            received[message] = one
                            foreign[message] = (
                                strange,
                                other in own.covered(end.module, unit)
                                and other in own.covered(end.opposite.module, peer),
                            )
    assert sent == received
    for message, (strange, is_touched) in foreign.items():
        assert (strange != received[message]) == is_touched, message


def test_a_step_without_contents_has_no_marks() -> None:
    view = RankView.of(cases.TWO_RANKS, 0, cases.WORKLOAD.edges)
    metadata = [bring_items(cases.WORKLOAD, cases.TWO_RANKS.micro_batch_size, np.random.default_rng(0))]
    own = StepMap(PlanMap(view, cases.WORKLOAD), metadata)
    (end, *_) = view.modules["vision"].exports
    assert not own.is_marked and own.hidden_mark("llm", 0, 0) is None
    assert own.marks_sent(end, 0, 0) == own.marks_received(end, 0, 0) == ()
    assert len(own.rows(end, 0)) and not len(own.rows(end, 0).numbers)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.long, torch.bool])
def test_every_number_of_a_batch_counts(dtype) -> None:
    batch = {"a": torch.zeros(2, 3).to(dtype), "b": torch.zeros(2)}
    changed = {"a": batch["a"].clone(), "b": batch["b"]}
    changed["a"][1, 2] = 1
    variants = [batch, changed, {"b": batch["a"], "a": batch["b"]}, {**batch, "a": batch["a"].T}, {"a": batch["a"]}]
    assert len({fingerprint_samples(one) for one in variants}) == len(variants)
    assert fingerprint_samples(batch) == fingerprint_samples(dict(reversed(batch.items())))


def test_marks_tell_rows_samples_and_places_apart() -> None:
    rows, others = np.array([0, 1, 2]), np.array([0, 2, 1])
    marks = [mark([b"x"], ("a",), rows), mark([b"x"], ("a",), others), mark([b"y"], ("a",), rows)]
    assert len({*marks, mark([b"x"], ("b",), rows)}) == 4
    require_same(marks[0], mark([b"x"], ("a",), rows), 0, 1)
    with pytest.raises(BatchError, match="a message from rank 3 to rank 1"):
        require_same(marks[0], marks[1], 3, 1)


@pytest.mark.dist
@pytest.mark.parametrize("plan", [cases.TWO_RANKS, cases.SAME_PIPELINE], ids=["rows", "hidden states"])
def test_a_rank_that_reads_other_samples_is_found_at_the_first_message(plan, tmp_path, monkeypatch) -> None:
    """Rank 1 reads pictures in another order: every size is right, and without fingerprints it trains on garbage."""
    sound = step.Batches.__init__

    def init(self, samples, collate_samples) -> None:
        def turned(one):
            batch = collate_samples(one)
            values = batch["vision/values"]
            return {**batch, "vision/values": values.flip(0)} if dist.get_rank() == 1 else batch

        sound(self, samples, turned)

    monkeypatch.setattr(step.Batches, "__init__", init)
    with pytest.raises(RankFailure) as failure:
        check_plan(cases.written(replace(plan, micro_batch_size=8, global_batch_size=8), tmp_path), steps=1)
    assert re.search(r"rank \d, step 1 lane \w+\.\d action \S+ failed: BatchError", failure.value.where), failure.value
