"""How a batch falls into items, rows and inputs of a shard, against loops that say the same in the plainest way."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_mosaic.any2any.definition import Any2Any
from megatron_mosaic.any2any.synthetic import SyntheticDataset, collate
from megatron_mosaic.parallel_state_ext.boundaries.items import shard_of
from megatron_mosaic.plan import Layout, ModulePlan, RankSet
from tests.numerics.acceptance_cases import WEB

MODEL = Any2Any(WEB, build_config=None)
MEAN = Any2Any(WEB, build_config=None, mean_over_samples=True)
DATA = SyntheticDataset("train", workload=WEB, num_samples=64, seed=3)
batches = st.lists(st.integers(0, 63), min_size=1, max_size=5).map(lambda ids: collate(WEB)([DATA[i] for i in ids]))
layouts = st.tuples(st.sampled_from([1, 2]), st.sampled_from([1, 2]), st.booleans())


def shards(name, batch, tp, cp, split):
    """Every rank's share of a lane that has all items."""
    plan = ModulePlan(ranks=RankSet.of(range(tp * cp)), layout=Layout(tp=tp, cp=cp), sequence_parallel=split and tp > 1)
    items = MODEL.list_items(batch)[name]
    return [shard_of(plan, range(len(items)), items.tokens, cp=c, tp=t) for c in range(cp) for t in range(tp)]


@settings(deadline=None)
@given(batches)
def test_items_and_links_are_those_of_the_tables(batch):
    items = MODEL.list_items(batch)
    assert items["llm"].samples.tolist() == list(range(len(batch["tokens"])))
    assert set(items["llm"].tokens.tolist()) == {64}
    for name in ("image", "audio", "generator", "speech"):
        assert items[name].samples.tolist() == batch[f"{name}/samples"].tolist()
        assert items[name].tokens.tolist() == batch[f"{name}/tokens"].tolist()
    for edge in WEB.edges:
        links = MODEL.list_links(edge, batch)
        table = [links.source_items, links.source_starts, links.target_items, links.target_starts, links.rows]
        assert [column.tolist() for column in table] == batch[f"{edge.source}>{edge.target}"].tolist()


@settings(deadline=None)
@given(batches, layouts)
def test_inputs_of_the_backbone_are_its_tokens(batch, layout):
    for shard in shards("llm", batch, *layout):
        inputs = MODEL.select_inputs("llm", batch, shard)
        positions = shard.cp_tokens.tolist()
        assert inputs["positions"].tolist() == positions
        for key, whole in (("tokens", "tokens"), ("labels", "labels"), ("weights", "loss_mask")):
            assert inputs[key].tolist() == [[row[p] for p in positions] for row in batch[whole].tolist()]


@settings(deadline=None)
@given(batches, layouts)
def test_inputs_of_items_are_their_values_padded(batch, layout):
    for shard in shards("generator", batch, *layout):
        if not shard.items:
            continue
        inputs, lengths = MODEL.select_inputs("generator", batch, shard), batch["generator/tokens"].tolist()
        for key in ("values", "targets"):
            assert inputs[key].shape[:2] == (len(shard.tokens), len(shard.items))
            for row, token in enumerate(shard.tokens.tolist()):
                for item, length in enumerate(lengths):
                    if token < length:
                        assert torch.equal(inputs[key][row, item], batch[f"generator/{key}"][item, token])
        expected = [[float(t < n) for n in lengths] for t in shard.tokens.tolist()]
        assert inputs["weights"].tolist() == expected
        if min(lengths) < shard.length:
            padding = [[t >= n for t in range(shard.length)] for n in lengths]
            assert inputs["padding"][:, 0, 0].tolist() == padding
        else:
            assert "padding" not in inputs


@settings(deadline=None)
@given(batches, layouts)
def test_weights_of_all_ranks_add_up_to_the_samples_or_drawings(batch, layout):
    """Every token of one cp rank once: a sample with loss tokens weighs 1 in the mean over samples."""
    for name in ("llm", "generator"):
        total = 0.0
        for shard in shards(name, batch, layout[0], layout[1], False)[:: layout[0]]:
            if shard.items:
                inputs = MEAN.select_inputs(name, batch, shard)
                total += float(inputs["weights"].double().sum() if name == "llm" else inputs["weight_sum"])
        counted = int((batch["loss_mask"].sum(1) > 0).sum()) if name == "llm" else len(batch["generator/tokens"])
        assert abs(total - counted) < 1e-5
