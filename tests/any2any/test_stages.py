"""One stage at a time, and stages of a pipeline put together by hand, in one process."""

import pytest
import torch
import torch.distributed as dist
from megatron.core.transformer.enums import AttnMaskType

from megatron_mosaic.any2any.data import DigitsDataset, SampleWriter, collate
from megatron_mosaic.any2any.sizes import DigitsMix
from megatron_mosaic.errors import PlanError
from megatron_mosaic.plan import Layout


@pytest.fixture
def batch(model):
    mix = DigitsMix(text_only_frac=0.1, two_image_frac=0.3, generate_frac=0.5)
    data = DigitsDataset("train", sizes=model.sizes, mix=mix, num_samples=6, seed=5)
    batch = collate([data[idx] for idx in range(6)])
    assert len(batch["images"]) > 1 and len(batch["gen_start"]) > 0
    return batch


@pytest.fixture
def text_batch():
    writer = SampleWriter(64)
    writer.add_caption("after one comes two")
    return collate([writer.finish(), writer.finish()])


def inputs_of(model, name, batch):
    return model.select_inputs(name, batch, list(range(sum(model.count_items(batch)[name]))))


def test_vision_exports_rows_as_wide_as_the_llm(model, build_stages, batch):
    (stage,) = build_stages()["vision"]
    output = stage(inputs_of(model, "vision", batch), None, {})
    assert output.exports["llm"].shape == (len(batch["images"]) * 16, 64)
    assert output.hidden is None and output.loss is None and output.num_tokens == 0


def test_rows_of_vision_are_image_by_image(model, build_stages, batch):
    """Oracle: no image attends to another, so an image alone gives the same rows as in company."""
    (stage,) = build_stages()["vision"]
    together = stage(inputs_of(model, "vision", batch), None, {}).exports["llm"]
    for idx in range(len(batch["images"])):
        alone = stage(model.select_inputs("vision", batch, [idx]), None, {}).exports["llm"]
        torch.testing.assert_close(together[16 * idx : 16 * idx + 16], alone)


def test_llm_uses_each_row_at_its_place_and_text_elsewhere(model, build_stages, batch):
    """Oracle: the embedding of all tokens, with the rows written into it one after the other."""
    (stage,) = build_stages()["llm"]
    rows = torch.randn(len(batch["images"]) * 16, 64)
    inputs = inputs_of(model, "llm", batch)
    embedded = stage._embed(inputs, {"vision": rows})
    expected = stage.embedding(batch["tokens"], torch.arange(64).expand(6, 64)).detach().clone()
    for idx, (sample, start) in enumerate(zip(batch["image_sample"], batch["image_start"])):
        for patch in range(16):
            expected[start + patch, sample] = rows[16 * idx + patch]
    torch.testing.assert_close(embedded, expected)


def test_llm_loss_and_exports(model, build_stages, batch):
    (stage,) = build_stages()["llm"]
    rows = torch.randn(len(batch["images"]) * 16, 64, requires_grad=True)
    output = stage(inputs_of(model, "llm", batch), None, {"vision": rows})
    assert output.num_tokens == batch["loss_mask"].sum()
    assert output.report["lm loss"].tolist() == [output.loss.item(), output.num_tokens]
    assert output.exports["generator"].shape == (len(batch["gen_start"]) * 16, 64)
    # Oracle of the loss: torch's own cross entropy of the same logits.
    hidden = stage.block(stage._embed(inputs_of(model, "llm", batch), {"vision": rows}), attention_mask=None)
    logits = stage.output_layer(hidden)[0].transpose(0, 1)
    counted = batch["loss_mask"] > 0
    expected = torch.nn.functional.cross_entropy(logits[counted], batch["labels"][counted], reduction="sum")
    torch.testing.assert_close(output.loss, expected)
    for idx, (sample, start) in enumerate(zip(batch["gen_sample"], batch["gen_start"])):
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
    inputs = inputs_of(model, "llm", text_batch)
    absent = stage(inputs, None, {})
    empty = stage(inputs, None, {"vision": torch.empty(0, 64, requires_grad=True)})
    assert absent.exports["generator"].shape == (0, 64)
    assert torch.equal(absent.loss, empty.loss)
    absent.loss.backward()


def test_generator_loss_is_weighted_and_its_report_is_not(model, build_stages, batch):
    (stage,) = build_stages()["generator"]
    inputs, num_drawings = inputs_of(model, "generator", batch), len(batch["gen_start"])
    rows = torch.randn(16 * num_drawings, 64, requires_grad=True)
    stage.loss_weight = 1.0
    output = stage(inputs, None, {"llm": rows})
    stage.loss_weight = 3.0
    weighted = stage(inputs, None, {"llm": rows})
    assert output.num_tokens == 16 * num_drawings
    assert output.report["generator loss"].tolist() == [output.loss.item(), output.num_tokens]
    torch.testing.assert_close(weighted.loss, 3 * output.loss)
    assert torch.equal(weighted.report["generator loss"], output.report["generator loss"])
    output.loss.backward()
    assert (rows.grad.abs().sum(-1) > 0).all()


def test_generator_loss_is_the_squared_pixel_error(model, build_stages, batch):
    """Oracle: a head with zero weights draws its bias, here 0.5 above a constant target."""
    (stage,) = build_stages()["generator"]
    stage.loss_weight = 1.0
    inputs = inputs_of(model, "generator", batch)
    inputs["gen_target"] = torch.full_like(inputs["gen_target"], 0.25)
    torch.nn.init.zeros_(stage.pixel_head.weight)
    torch.nn.init.constant_(stage.pixel_head.bias, 0.75)
    loss = stage(inputs, None, {"llm": torch.randn(len(inputs["gen_noisy"]) * 16, 64)}).loss
    assert loss.item() == pytest.approx(0.25 * len(inputs["gen_noisy"]) * 16)  # (0.75 - 0.25)^2 per patch


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


@pytest.mark.parametrize("axis", ["cp", "vpp", "ep"])
def test_axes_that_are_not_supported_are_refused(model, axis):
    layout = Layout(**{axis: 2, **({"dp": 2} if axis == "ep" else {})})
    with pytest.raises(PlanError, match=rf"modules\.llm\.layout\.{axis}"):
        model.build_stage("llm", layout, 0, dist.group.WORLD)


def test_every_parameter_gets_a_gradient(build_stages, run_model, batch):
    stages = build_stages()
    run_model(stages, batch)[0].backward()
    for name, (stage,) in stages.items():
        assert [key for key, parameter in stage.named_parameters() if parameter.grad is None] == [], name
