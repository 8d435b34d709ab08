"""The reference model learns: it is a model and not only shapes. One process, plain Adam, held-out samples."""

import pytest
import torch

from megatron_mosaic.any2any.data import DigitsDataset, Split, collate, load_images
from megatron_mosaic.any2any.sizes import Any2AnySizes, DigitsMix

BATCH_SIZE = 16


@pytest.fixture(scope="module")
def held_out(model):
    data = DigitsDataset("valid", sizes=Any2AnySizes(), mix=DigitsMix(), num_samples=256, seed=1)
    return collate([data[idx] for idx in range(256)])


def train(model, stages, run_model, num_steps):
    data = DigitsDataset("train", sizes=Any2AnySizes(), mix=DigitsMix(), num_samples=num_steps * BATCH_SIZE, seed=1)
    parameters = [parameter for (stage,) in stages.values() for parameter in stage.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=3e-3)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps, eta_min=3e-4)
    for step in range(num_steps):
        loss, _ = run_model(stages, collate([data[step * BATCH_SIZE + n] for n in range(BATCH_SIZE)]))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        decay.step()


def evaluate(stages, run_model, batch):
    with torch.no_grad():
        return run_model(stages, batch)[1]


def unigram_entropy(model):
    """Loss of the best model that ignores everything but how often each caption word occurs, in nats."""
    data = DigitsDataset("train", sizes=Any2AnySizes(), mix=DigitsMix(), num_samples=1000, seed=1)
    batch = collate([data[idx] for idx in range(1000)])
    share = torch.bincount(batch["labels"][batch["loss_mask"] > 0]).double()
    share = share[share > 0] / share.sum()
    return -(share * share.log()).sum().item()


def mean_image_loss(held_out):
    """Pixel loss of always drawing the mean training image."""
    images, _ = load_images(Split.train)
    return (held_out["generator/targets"] - images.mean(0)).square().mean().item()


def test_a_few_steps_beat_word_counts(model, build_stages, run_model, held_out):
    torch.manual_seed(0)
    stages = build_stages()
    before = evaluate(stages, run_model, held_out)
    train(model, stages, run_model, 60)
    after = evaluate(stages, run_model, held_out)
    assert after["lm loss"] < unigram_entropy(model) / 3
    assert after["generator loss"] < 0.4 * before["generator loss"]


@pytest.mark.slow
def test_more_steps_use_what_crosses_the_borders(model, build_stages, run_model, held_out):
    torch.manual_seed(0)
    stages = build_stages()
    train(model, stages, run_model, 800)
    report = evaluate(stages, run_model, held_out)
    print(report, "unigram", unigram_entropy(model), "mean image", mean_image_loss(held_out))
    assert report["lm loss"] < unigram_entropy(model) / 5
    assert report["generator loss"] < 0.9 * mean_image_loss(held_out)
    # The words depend on the images: with other samples' images they are worse.
    other_images = evaluate(stages, run_model, {**held_out, "vision/values": held_out["vision/values"].roll(1, 0)})
    print("other images", other_images)
    assert other_images["lm loss"] > 1.5 * report["lm loss"]
    # The drawings depend on the words: asked for by other samples they are worse than the mean image.
    keys = ("generator/values", "generator/targets")
    other_rows = evaluate(stages, run_model, {**held_out, **{key: held_out[key].roll(1, 0) for key in keys}})
    print("other rows", other_rows)
    assert other_rows["generator loss"] > mean_image_loss(held_out)
