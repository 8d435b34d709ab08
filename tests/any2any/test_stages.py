"""One stage at a time, and stages of a pipeline put together by hand, in one process."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.transformer.enums import AttnMaskType

from megatron_mosaic.any2any.data import DigitsDataset, SampleWriter, collate
from megatron_mosaic.any2any.sizes import Any2AnySizes, DigitsMix
from megatron_mosaic.plan import Layout, ModulePlan, RankSet
from megatron_mosaic.runtime.parameters import whole_name
from tests.any2any.conftest import groups_of, inputs_of


@pytest.fixture
def batch():
    mix = DigitsMix(text_only_frac=0.1, two_image_frac=0.3, generate_frac=0.5)
    data = DigitsDataset("train", sizes=Any2AnySizes(), mix=mix, num_samples=6, seed=5)
    batch = collate([data[idx] for idx in range(6)])
    assert len(batch["vision/values"]) > 1 and len(batch["generator/values"]) > 0
    return batch


@pytest.fixture
def text_batch():
    writer = SampleWriter(64)
    writer.add_caption("after one comes two")
    return collate([writer.finish(), writer.finish()])


def test_vision_exports_rows_as_wide_as_the_llm(model, build_stages, batch):
    (stage,) = build_stages()["vision"]
    output = stage(inputs_of(model, "vision", batch))
    assert output.exports["llm"].shape == (len(batch["vision/values"]) * 16, 64)
    assert output.hidden is None and output.loss is None and output.num_tokens == 0


def test_rows_of_vision_are_image_by_image(model, build_stages, batch):
    """Oracle: no image attends to another, so an image alone gives the same rows as in company."""
    (stage,) = build_stages()["vision"]
    together = stage(inputs_of(model, "vision", batch)).exports["llm"]
    tokens = torch.arange(16)
    for idx in range(len(batch["vision/values"])):
        alone = replace(
            inputs_of(model, "vision", batch, items=[idx]), exports_at={"llm": (tokens, torch.zeros_like(tokens))}
        )
        torch.testing.assert_close(together[16 * idx : 16 * idx + 16], stage(alone).exports["llm"])


def test_padding_changes_nothing(model, build_stages, batch):
    """Oracle: the image cut short, alone. In company of longer ones it is padded and its padding never attended to."""
    (stage,) = build_stages()["vision"]
    short = {**batch, "vision/tokens": torch.tensor([5, *batch["vision/tokens"][1:].tolist()])}
    at = {"llm": (torch.arange(5), torch.zeros(5, dtype=torch.long))}
    together = replace(inputs_of(model, "vision", short, items=[0, 1]), exports_at=at)
    alone = replace(inputs_of(model, "vision", short, items=[0]), exports_at=at)
    assert (together.shard.length, alone.shard.length) == (16, 5) and "padding" not in alone.tensors
    torch.testing.assert_close(stage(together).exports["llm"], stage(alone).exports["llm"])


def test_llm_uses_each_row_at_its_place_and_text_elsewhere(model, build_stages, batch):
    """Oracle: the embedding of all tokens, with the rows written into it one by one, through the same layers."""
    (stage,) = build_stages()["llm"]
    rows = torch.randn(len(batch["vision/values"]) * 16, 64)
    written = stage.embedding(batch["tokens"], torch.arange(64).expand(6, 64)).detach().clone()
    for idx, (image, _, sample, start, _) in enumerate(batch["vision>llm"].T.tolist()):
        assert idx == image
        for patch in range(16):
            written[start + patch, sample] = rows[16 * image + patch]
    inputs = inputs_of(model, "llm", batch, {"vision": rows})
    torch.testing.assert_close(stage(inputs).loss, stage(replace(inputs, hidden=written)).loss)


def test_llm_loss_and_exports(model, build_stages, batch):
    (stage,) = build_stages()["llm"]
    rows = torch.randn(len(batch["vision/values"]) * 16, 64, requires_grad=True)
    inputs = inputs_of(model, "llm", batch, {"vision": rows})
    output = stage(inputs)
    assert output.num_tokens == batch["loss_mask"].sum()
    assert output.report["lm loss"].tolist() == [output.loss.item(), float(output.num_tokens)]
    # Oracle of the loss: torch's own cross entropy of the same logits.
    hidden = stage.embedding(batch["tokens"], torch.arange(64).expand(6, 64)).index_put(
        inputs.imports_at["vision"], rows
    )
    hidden = stage.block(hidden, attention_mask=None)
    logits = stage.output_layer(hidden)[0].transpose(0, 1)
    counted = batch["loss_mask"] > 0
    expected = torch.nn.functional.cross_entropy(logits[counted], batch["labels"][counted], reduction="sum")
    torch.testing.assert_close(output.loss, expected)
    for sample, start, idx, _, _ in batch["llm>generator"].T.tolist():
        torch.testing.assert_close(
            output.exports["generator"][16 * idx : 16 * idx + 16], hidden[start : start + 16, sample]
        )
    (output.loss + output.exports["generator"].sum()).backward()
    assert (rows.grad.abs().sum(-1) > 0).all()


def test_llm_is_causal_and_the_others_are_not(build_stages):
    masks = {name: stage.block.layers[0].self_attention.attn_mask_type for name, (stage,) in build_stages().items()}
    assert masks == {"vision": AttnMaskType.no_mask, "llm": AttnMaskType.causal, "generator": AttnMaskType.no_mask}


def test_llm_without_images_or_drawings(model, build_stages, text_batch):
    (stage,) = build_stages()["llm"]
    absent = stage(inputs_of(model, "llm", text_batch))
    empty = stage(inputs_of(model, "llm", text_batch, {"vision": torch.empty(0, 64, requires_grad=True)}))
    assert absent.exports["generator"].shape == (0, 64)
    assert torch.equal(absent.loss, empty.loss)
    absent.loss.backward()


def test_generator_loss_is_weighted_and_its_report_is_not(model, build_stages, batch):
    (stage,) = build_stages()["generator"]
    num_drawings = len(batch["generator/values"])
    rows = torch.randn(16 * num_drawings, 64, requires_grad=True)
    inputs = inputs_of(model, "generator", batch, {"llm": rows})
    stage.loss_weight = 1.0
    output = stage(inputs)
    stage.loss_weight = 3.0
    weighted = stage(inputs)
    assert output.num_tokens == 16 * num_drawings
    assert output.report["generator loss"].tolist() == [output.loss.item(), float(output.num_tokens)]
    torch.testing.assert_close(weighted.loss, 3 * output.loss)
    assert torch.equal(weighted.report["generator loss"], output.report["generator loss"])
    output.loss.backward()
    assert (rows.grad.abs().sum(-1) > 0).all()


def test_generator_loss_is_the_squared_pixel_error(model, build_stages, batch):
    """Oracle: a head with zero weights draws its bias, here 0.5 above a constant target."""
    (stage,) = build_stages()["generator"]
    stage.loss_weight = 1.0
    num_drawings = len(batch["generator/values"])
    flat = {**batch, "generator/targets": torch.full_like(batch["generator/targets"], 0.25)}
    torch.nn.init.zeros_(stage.output_head.weight)
    torch.nn.init.constant_(stage.output_head.bias, 0.75)
    loss = stage(inputs_of(model, "generator", flat, {"llm": torch.randn(num_drawings * 16, 64)})).loss
    assert loss.item() == pytest.approx(0.25 * num_drawings * 16)  # (0.75 - 0.25)^2 per patch


@pytest.mark.parametrize("degree", [2, 4])
def test_pipeline_equals_one_stage(model, build_stages, run_model, batch, degree):
    """Oracle: the same weights in one stage. Loss and every gradient agree."""
    whole, split = build_stages(), build_stages(vision=degree, llm=degree, generator=degree)
    for name in whole:
        load_split_weights(whole[name][0], split[name])
    loss, report = run_model(whole, batch)
    split_loss, split_report = run_model(split, batch)
    loss.backward()
    split_loss.backward()
    torch.testing.assert_close(split_loss, loss)
    assert split_report == pytest.approx(report)
    for name in whole:
        expected = dict(whole[name][0].named_parameters())
        seen = set()
        for stage_idx, stage in enumerate(split[name]):
            for key, parameter in stage.named_parameters():
                full_key = name_in_whole(key, stage_idx, len(stage.block.layers))
                torch.testing.assert_close(parameter.grad, expected[full_key].grad)
                seen.add(full_key)
        assert seen == set(expected)


@pytest.mark.parametrize("name", ["vision", "generator"])
def test_layer_ranges_of_one_rank_are_the_whole_module(model, build_stages, name):
    """Virtual stages with pp 1: parameters, and what a checkpoint calls them and where it puts them."""
    (whole,) = build_stages()[name]
    placed = ModulePlan(ranks=RankSet.of([0]), layout=Layout(vpp=4))
    parts = [model.build_stage(name, placed, 0, groups_of(dist.group.WORLD), chunk) for chunk in range(4)]
    assert [len(part.block.layers) for part in parts] == [1] * 4
    assert {whole_name(part, key) for part in parts for key, _ in part.named_parameters()} == {
        key for key, _ in whole.named_parameters()
    }

    metadata = {"dp_cp_group": dist.group.WORLD}

    def saved(stage):
        tensors = [
            each
            for each in stage.sharded_state_dict("m.", metadata=metadata).values()
            if isinstance(each, ShardedTensor)
        ]
        return {(each.key, each.global_shape, each.global_offset) for each in tensors}

    found = [saved(part) for part in parts]
    assert set.union(*found) == saved(whole) and sum(map(len, found)) == len(saved(whole))


def load_split_weights(whole, stages):
    weights = dict(whole.named_parameters())
    for stage_idx, stage in enumerate(stages):
        for key, parameter in stage.named_parameters():
            parameter.data.copy_(weights[name_in_whole(key, stage_idx, len(stage.block.layers))].data)


def name_in_whole(key, stage_idx, layers_per_stage):
    parts = key.split(".")
    if parts[:2] == ["block", "layers"]:
        parts[2] = str(int(parts[2]) + stage_idx * layers_per_stage)
    return ".".join(parts)


def test_every_parameter_gets_a_gradient(build_stages, run_model, batch):
    stages = build_stages()
    run_model(stages, batch)[0].backward()
    for name, (stage,) in stages.items():
        assert [key for key, parameter in stage.named_parameters() if parameter.grad is None] == [], name
