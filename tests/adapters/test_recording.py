"""What is taken down of a script: its loss function, its model, and where upstream puts images. Needs no checkout."""

from __future__ import annotations

from argparse import Namespace
from functools import partial

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from megatron.core import parallel_state
from megatron.core.transformer import MegatronModule, TransformerConfig

from megatron_mosaic.adapters.batches.tokens import ItemRows, list_items, list_links
from megatron_mosaic.adapters.llava.batch import VISION, ImageTokens, place_tokens
from megatron_mosaic.adapters.recording import LossFunction, record_model
from megatron_mosaic.adapters.single_process import SingleProcess, world_of_one
from megatron_mosaic.adapters.stages import LLM, LOSS_MASK
from megatron_mosaic.errors import ConfigError

HOLE = object()
IMAGE = -200


def summed(mask, losses):
    total = (mask * losses).sum()
    return total, mask.sum(), {"lm loss": torch.stack([total.detach(), mask.sum()])}


def normalised(mask, losses):
    total = (mask * losses).sum() / mask.sum()
    return total, torch.tensor(1.0), {"lm loss": total}


def test_a_loss_function_gets_the_mask_of_any_samples():
    mask, losses = torch.tensor([[1.0, 0.0], [1.0, 1.0]]), torch.tensor([[2.0, 9.0], [3.0, 4.0]])
    found = LossFunction(partial(summed, HOLE), HOLE)
    found.require_sums(mask)
    assert [float(x) for x in found(mask, losses)[:2]] == [9.0, 3.0]
    assert [float(x) for x in found(mask[:1], losses[:1])[:2]] == [2.0, 1.0]


def test_what_is_normalised_in_a_microbatch_is_refused_by_name():
    with pytest.raises(ConfigError, match="loss function") as caught:
        LossFunction(partial(normalised, HOLE), HOLE).require_sums(torch.ones(2, 3))
    assert "one by one" in caught.value.got


@pytest.mark.parametrize(
    "returned",
    [summed, partial(summed), partial(summed, torch.ones(2)), partial(summed, HOLE, extra=torch.ones(2))],
    ids=["no partial", "no mask", "another mask", "more of the batch"],
)
def test_other_partials_are_refused(returned):
    with pytest.raises(ConfigError):
        LossFunction(returned, HOLE)


class Known(MegatronModule):
    def __init__(self, config, size=3):
        raise AssertionError("is not to be built")


class Other(MegatronModule):
    def __init__(self, config):
        super().__init__(config)
        raise AssertionError("is not to be built")


CONFIG = TransformerConfig(num_layers=1, hidden_size=4, num_attention_heads=1)


def test_a_model_is_taken_down_and_not_built():
    def provider(pre_process, post_process):
        assert parallel_state.is_pipeline_first_stage() and parallel_state.is_pipeline_last_stage()
        model = Known(CONFIG)
        model.tower.requires_grad_(False)
        return model

    with world_of_one(), SingleProcess(Namespace())():
        record = record_model(provider, {Known: lambda arguments: ("tower", "rest")})
    assert record.arguments == {"config": CONFIG, "size": 3}
    assert record.frozen == {"tower": True, "rest": False}
    assert not dist.is_initialized() and not parallel_state.model_parallel_is_initialized()


def test_a_model_that_no_adapter_knows_is_refused_before_it_is_built():
    with world_of_one(), SingleProcess(Namespace())(), pytest.raises(ConfigError, match="Other"):
        record_model(lambda **_: Other(CONFIG), {Known: lambda arguments: ()})


def test_what_a_script_sees_is_put_back():
    args = Namespace(tensor_model_parallel_size=4, ckpt_format="torch_dist", seq_length=7)
    with world_of_one(), SingleProcess(args, dataloader_type="single")():
        assert (args.tensor_model_parallel_size, args.ckpt_format, args.seq_length) == (1, "torch", 7)
        args.seq_length = 9  # what the script sets itself stays
        assert parallel_state.get_tensor_model_parallel_world_size() == 1
    assert vars(args) == {"tensor_model_parallel_size": 4, "ckpt_format": "torch_dist", "seq_length": 9}


@st.composite
def token_rows(draw: st.DrawFn) -> torch.Tensor:
    """Ids of 1-3 samples; each token is an image's or its own number."""
    samples, length = draw(st.integers(1, 3)), draw(st.integers(1, 8))
    return torch.tensor([[draw(st.sampled_from([IMAGE, 1 + i, 1 + i])) for i in range(length)] for _ in range(samples)])


@given(token_rows(), st.integers(1, 4), st.integers(3, 40))
def test_images_stand_where_their_tokens_stood(ids, rows, max_length):
    """The oracle: every token written out, an image as many times as it has rows, cut off at the longest sequence."""
    images = ItemRows(module=VISION, rows=rows, tokens=rows)
    count = int((ids == IMAGE).sum())
    call = {
        "input_ids": ids,
        "position_ids": torch.arange(ids.shape[1]).expand_as(ids),
        "labels": torch.ones_like(ids),
        "loss_mask": torch.ones(ids.shape),
        "images": torch.zeros(count, 3, 2, 2),
        "num_image_tiles": None,
    }
    batch = place_tokens(call, ImageTokens(images=images, image_token=IMAGE, max_length=max_length))
    expected, number = [], 0
    for sample in ids.tolist():
        written: list[tuple[str, int]] = []
        for token in sample:
            if token == IMAGE:
                written += [("row", number * rows + j) for j in range(rows)]
                number += 1
            else:
                written.append(("text", token))
        expected.append(written[:max_length])
    for i, written in enumerate(expected):
        found = [
            ("text", int(batch["ids"][i, p])) if batch["is_text"][i, p] else ("row", int(batch["rows.vision"][i, p]))
            for p in range(len(written))
        ]
        assert found == written
        assert not batch["is_text"][i, len(written) :].any() and (batch["rows.vision"][i, len(written) :] == -1).all()
        assert not batch[LOSS_MASK][i][batch["rows.vision"][i] >= 0].any()
    items, links = list_items(batch, [images]), list_links(batch, images)
    assert items[LLM].tokens.tolist() == [len(written) for written in expected]
    assert len(items[VISION]) == count
    placed = np.full(batch["rows.vision"].shape, -1)
    for item, start, sample, place, size in zip(
        links.source_items, links.source_starts, links.target_items, links.target_starts, links.rows, strict=True
    ):
        placed[sample, place : place + size] = item * rows + start + np.arange(size)
        assert items[VISION].samples[item] == sample
    assert (placed == batch["rows.vision"].numpy()).all()
