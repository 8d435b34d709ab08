"""How a batch falls into items, against loops that say the same in the plainest way."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_mosaic.any2any.definition import Any2Any
from megatron_mosaic.any2any.sizes import Any2AnySizes, DigitsMix

SEQ_LENGTH = 6
MODEL = Any2Any(sizes=Any2AnySizes(), mix=DigitsMix(), global_batch_size=16, build_config=None)


@st.composite
def batches(draw):
    """Batches whose every value is different, so that a mixed-up row shows."""
    images = draw(st.lists(st.integers(0, 3), min_size=1, max_size=6))  # per sample
    drawings = draw(st.lists(st.integers(0, 2), min_size=len(images), max_size=len(images)))
    batch = {
        key: torch.arange(len(images) * SEQ_LENGTH).reshape(-1, SEQ_LENGTH) + offset
        for offset, key in enumerate(("tokens", "labels", "loss_mask"))
    }
    for kind, counts, keys in (("image", images, ("images",)), ("gen", drawings, ("gen_noisy", "gen_target"))):
        total = sum(counts)
        batch[f"{kind}_sample"] = torch.tensor([n for n, k in enumerate(counts) for _ in range(k)], dtype=torch.long)
        batch[f"{kind}_start"] = torch.arange(total) + 100
        batch |= {key: torch.rand(total, 16, 4) for key in keys}
    return batch


@given(batches())
def test_count_items(batch):
    counts = MODEL.count_items(batch)
    samples = range(len(batch["tokens"]))
    assert counts["vision"] == [batch["image_sample"].tolist().count(n) for n in samples]
    assert counts["generator"] == [batch["gen_sample"].tolist().count(n) for n in samples]
    assert counts["llm"] == [1 for _ in samples]


@settings(deadline=None)
@given(batches(), st.data())
def test_select_inputs_of_the_llm(batch, data):
    num_samples = len(batch["tokens"])
    lane = data.draw(st.lists(st.integers(0, num_samples - 1), unique=True, min_size=1))
    inputs = MODEL.select_inputs("llm", batch, lane)
    for key in ("tokens", "labels", "loss_mask"):
        assert inputs[key].tolist() == [batch[key][n].tolist() for n in lane]
    for kind in ("image", "gen"):
        expected = [
            (position, start)
            for position, n in enumerate(lane)
            for sample, start in zip(batch[f"{kind}_sample"].tolist(), batch[f"{kind}_start"].tolist())
            if sample == n
        ]
        assert list(zip(inputs[f"{kind}_sample"].tolist(), inputs[f"{kind}_start"].tolist())) == expected


@settings(deadline=None)
@given(batches(), st.data())
def test_select_inputs_of_items(batch, data):
    for module, keys in (("vision", ("images",)), ("generator", ("gen_noisy", "gen_target"))):
        total = len(batch[keys[0]])
        lane = data.draw(st.lists(st.integers(0, max(0, total - 1)), unique=True, max_size=total))
        inputs = MODEL.select_inputs(module, batch, lane)
        assert set(inputs) == set(keys)
        for key in keys:
            assert inputs[key].shape == (len(lane), 16, 4)
            assert all(torch.equal(row, batch[key][idx]) for row, idx in zip(inputs[key], lane))
