"""The digit samples: which kinds there are, and that every token stands where it should."""

import sys

import numpy as np
import pytest
import torch

from megatron_mosaic.any2any import captions as text
from megatron_mosaic.any2any.data import SIGNAL, DigitsDataset, SampleWriter, Split, collate, load_images
from megatron_mosaic.any2any.sizes import Any2AnySizes, DigitsMix
from megatron_mosaic.errors import ConfigError


def dataset(split="train", *, num_samples=2000, seed=1, mix=None):
    return DigitsDataset(split, sizes=Any2AnySizes(), mix=mix or DigitsMix(), num_samples=num_samples, seed=seed)


@pytest.fixture(scope="module")
def samples():
    data = dataset()
    return [data[idx] for idx in range(len(data))]


def words(tokens) -> str:
    return text.decode(int(token) for token in tokens)


def test_splits_share_no_image_and_use_every_image():
    sizes = [len(load_images(split)[1]) for split in Split]
    assert sum(sizes) == 1797
    assert sizes[0] > 1400


def test_patches_are_the_image_row_by_row():
    from sklearn.datasets import load_digits

    images, digits = load_images(Split.valid)  # its first image is the ninth of all
    image = load_digits().images[8] / 8 - 1
    assert digits[0] == load_digits().target[8]
    for patch in range(16):
        row, column = 2 * (patch // 4), 2 * (patch % 4)
        assert images[0, patch].tolist() == pytest.approx(image[row : row + 2, column : column + 2].ravel().tolist())


def test_sample_is_a_function_of_seed_split_and_index():
    forwards = [dataset(num_samples=20)[idx] for idx in range(20)]
    longer = dataset(num_samples=500)
    for idx in reversed(range(20)):  # another dataset object, another order, another length
        for key, value in longer[idx].items():
            assert torch.equal(value, forwards[idx][key]), key
    for other in (dataset(seed=2), dataset("test")):
        assert any(not torch.equal(other[idx]["tokens"], forwards[idx]["tokens"]) for idx in range(20))


def test_index_past_the_end_is_an_error():
    with pytest.raises(IndexError):
        dataset(num_samples=3)[3]


def test_kinds_come_in_the_shares_of_the_mix(samples):
    # 2000 independent draws: a share's standard deviation is at most 0.0112, so 0.04 is more than three of them.
    mix = DigitsMix()
    images = np.array([len(sample["image_start"]) for sample in samples])
    drawings = np.array([len(sample["gen_start"]) for sample in samples])
    assert np.mean(drawings) == pytest.approx(mix.generate_frac, abs=0.04)
    assert np.mean(images == 2) == pytest.approx(mix.two_image_frac, abs=0.04)
    assert np.mean((images == 0) & (drawings == 0)) == pytest.approx(mix.text_only_frac, abs=0.04)
    assert np.mean(images) == pytest.approx(mix.images_per_sample, abs=0.07)
    assert np.mean((images == 1) & (drawings == 1)) == pytest.approx(mix.generate_frac / 2, abs=0.04)


def test_microbatches_bring_varying_numbers_of_images_and_some_none(samples):
    counts = [len(collate(samples[idx : idx + 2])["vision/values"]) for idx in range(0, 400, 2)]
    assert set(counts) == {0, 1, 2, 3, 4}


def test_captions_have_many_lengths_and_fit(samples):
    lengths = {int(sample["loss_mask"].sum()) for sample in samples}
    assert len(lengths) >= 6
    assert 0 in lengths  # a drawing asked for in words alone
    assert all(len(sample["tokens"]) == 64 for sample in samples)


def test_every_template_fits_the_default_sequence():
    longest_caption = max(len(template.split()) + 1 for template in (*text.ONE_IMAGE, *text.TWO_IMAGES))
    longest_prompt = max(len(prompt.split()) for prompt, _ in text.DRAW_AFTER_IMAGE)
    assert 1 + 32 + longest_caption <= 64
    assert 1 + 16 + longest_caption + longest_prompt + 16 <= 64


def test_sequence_too_short_says_what_is_needed():
    writer = SampleWriter(16)
    writer.add_image(torch.zeros(16, 4))
    with pytest.raises(ConfigError, match="at least 17"):
        writer.finish()


def test_vocabulary_too_small_says_what_is_needed():
    with pytest.raises(ConfigError, match="--vocab-size"):
        DigitsDataset("train", sizes=Any2AnySizes(vocab_size=16), mix=DigitsMix(), num_samples=1, seed=1)


def test_labels_are_the_next_words_of_the_caption_only():
    """By hand: <begin> <image>x16 the digit seven <end> draw a two <drawing>x16 <pad>x24."""
    image, noisy, target = torch.rand(16, 4), torch.rand(16, 4), torch.rand(16, 4)
    writer = SampleWriter(64)
    writer.add_image(image)
    writer.add_caption("the digit seven")
    writer.add_prompt("draw a two")
    writer.add_drawing(noisy, target)
    sample = writer.finish()

    expected = "<begin>" + 16 * " <image>" + " the digit seven <end> draw a two" + 16 * " <drawing>" + 24 * " <pad>"
    assert words(sample["tokens"]) == expected
    # Position 16, the last patch, predicts "the"; position 19, "seven", predicts the end.
    assert torch.nonzero(sample["loss_mask"]).flatten().tolist() == [16, 17, 18, 19]
    assert words(sample["labels"][16:20]) == "the digit seven <end>"
    assert sample["labels"][:16].eq(text.PAD).all() and sample["labels"][20:].eq(text.PAD).all()
    assert sample["image_start"].tolist() == [1]
    assert sample["gen_start"].tolist() == [24]
    assert torch.equal(sample["images"], image[None])
    assert torch.equal(sample["gen_noisy"], noisy[None])
    assert torch.equal(sample["gen_target"], target[None])


def test_placeholders_stand_where_the_starts_say(samples):
    for sample in samples[:300]:
        for starts, token in ((sample["image_start"], text.IMAGE), (sample["gen_start"], text.DRAWING)):
            expected = {start + patch for start in starts.tolist() for patch in range(16)}
            assert set(torch.nonzero(sample["tokens"] == token).flatten().tolist()) == expected


def test_caption_names_the_digit_of_its_image(samples):
    images, digits = load_images(Split.train)
    checked = 0
    for sample in samples[:200]:
        if not len(sample["images"]):
            continue
        of_images = [digits[(images == image).all(-1).all(-1)][0] for image in sample["images"]]
        caption = words(sample["labels"][sample["loss_mask"] > 0]).split()
        assert [word for word in caption if word in text.DIGITS] == [text.DIGITS[digit] for digit in of_images]
        checked += 1
    assert checked > 100


def test_text_counts_upwards():
    data = dataset(mix=DigitsMix(text_only_frac=0.9, two_image_frac=0.0, generate_frac=0.1), num_samples=100)
    sentences = {words(sample["labels"][sample["loss_mask"] > 0]) for sample in (data[idx] for idx in range(100))}
    assert {"nine plus one is zero <end>", "after four comes five <end>"} & sentences
    assert not any("{" in sentence for sentence in sentences)


def test_drawing_shows_the_digit_asked_for():
    data = dataset(mix=DigitsMix(text_only_frac=0.0, two_image_frac=0.0, generate_frac=1.0), num_samples=100)
    images, digits = load_images(Split.train)
    for sample in (data[idx] for idx in range(100)):
        start = int(sample["gen_start"][0])
        sentence = words(sample["tokens"][:start]).split()
        step = 1 if sentence[-2:] == ["next", "digit"] else 0
        named = [text.DIGITS.index(word) for word in sentence if word in text.DIGITS]
        target = digits[(images == sample["gen_target"][0]).all(-1).all(-1)][0]
        assert target == (named[-1] + step) % 10
        noise = sample["gen_noisy"] - SIGNAL * sample["gen_target"]
        assert 0.7 < noise.std() < 1.3


def test_collate_numbers_items_in_sample_order(samples):
    batch = collate(samples[:6])
    assert batch["tokens"].shape == batch["labels"].shape == batch["loss_mask"].shape == (6, 64)
    owners = [n for n, sample in enumerate(samples[:6]) for _ in sample["image_start"]]
    starts = [start for sample in samples[:6] for start in sample["image_start"].tolist()]
    assert batch["vision/samples"].tolist() == owners
    assert batch["vision/tokens"].tolist() == [16] * len(owners) and len(batch["vision/values"]) == len(owners)
    # image i, from its token 0 on, goes to its sample, from where it is announced on: all 16 rows
    assert batch["vision>llm"].T.tolist() == [[i, 0, n, s, 16] for i, (n, s) in enumerate(zip(owners, starts))]
    drawings = [(n, int(s)) for n, sample in enumerate(samples[:6]) for s in sample["gen_start"]]
    assert batch["llm>generator"].T.tolist() == [[n, s, i, 0, 16] for i, (n, s) in enumerate(drawings)]
    assert len(batch["generator/values"]) == len(batch["generator/targets"]) == len(drawings)


def test_collate_without_images():
    writer = SampleWriter(64)
    writer.add_caption("after one comes two")
    batch = collate([writer.finish()])
    assert batch["vision/values"].shape == batch["generator/targets"].shape == (0, 16, 4)
    assert batch["vision/samples"].dtype == torch.long and batch["vision>llm"].shape == (5, 0)


def test_without_scikit_learn_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    load_images.cache_clear()
    with pytest.raises(ConfigError, match=r"megatron-mosaic\[demo\]"):
        load_images(Split.train)
    load_images.cache_clear()
