"""The unmodified pretrain_vlm.py under plans of two modules: what Megatron computes on one process.

The reference is Megatron's own loop, model, data loader and optimizer, so it is right by construction.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_mosaic.errors import MosaicError
from tests.adapters.llava_cases import (
    MODERN,
    any_number_of_images,
    check,
    draw_images,
    keep_printed,
    needs_checkout,
    read_printed,
    write_plan,
)

LOSS_TOLERANCE = 2e-6
EXTERNAL = ("--dataloader-type", "external")
PLANS: dict[str, dict[str, object]] = {
    "disjoint": {"world_size": 4, "vision": "ranks: 0-1, layout: {tp: 2}", "llm": "ranks: 2-3, layout: {dp: 2}"},
    "partly overlapping": {
        "world_size": 3,
        "vision": "ranks: 0-1, layout: {dp: 2}",
        "llm": "ranks: 1-2, layout: {pp: 2}",
    },
    "dp 3": {
        "world_size": 3,
        "vision": "ranks: 0-2, layout: {dp: 3}",
        "llm": "ranks: 0-2, layout: {dp: 3}",
        "batch": 12,
    },
    "vision pp": {"world_size": 2, "vision": "ranks: 0-1, layout: {pp: 2}", "llm": "ranks: 0-1, layout: {tp: 2}"},
    "tp and pp": {
        "world_size": 4,
        "vision": "ranks: 0-3, layout: {dp: 4}",
        "llm": "ranks: 0-3, layout: {tp: 2, pp: 2}",
    },
    "cp": {"world_size": 2, "vision": "ranks: 0-1, layout: {dp: 2}", "llm": "ranks: 0-1, layout: {cp: 2}"},
    "sequence parallel": {
        "world_size": 2,
        "vision": "ranks: 0-1, layout: {tp: 2}",
        "llm": "ranks: 0-1, layout: {tp: 2}, sequence_parallel: true",
    },
    "cp and sequence parallel": {
        "world_size": 4,
        "vision": "ranks: 0-1, layout: {cp: 2}",
        "llm": "ranks: 0-3, layout: {tp: 2, cp: 2}, sequence_parallel: true",
    },
    "vision sequence parallel": {
        "world_size": 4,
        "vision": "ranks: 0-3, layout: {tp: 2, pp: 2}, sequence_parallel: true",
        "llm": "ranks: 0-3, layout: {dp: 2, pp: 2}",
    },
    "virtual stages": {
        "world_size": 2,
        "schedule": "interleaved",
        "vision": "ranks: 0-1, layout: {dp: 2}",
        "llm": "ranks: 0-1, layout: {pp: 2, vpp: 2}",
    },
    "nested": {
        "world_size": 2,
        "schedule": "nested",
        "vision": "ranks: 0-1, layout: {dp: 2}",
        "llm": "ranks: 0-1, layout: {pp: 2}",
    },
    "longer units": {
        "world_size": 2,
        "vision": "ranks: 0-1, layout: {dp: 2}, unit: 2",
        "llm": "ranks: 0-1, layout: {tp: 2}",
    },
    "recomputed": {
        "world_size": 2,
        "vision": "ranks: 0-1, layout: {dp: 2}, recompute: whole",
        "llm": "ranks: 0-1, layout: {tp: 2}, recompute: full",
    },
    "recomputed inside attention": {
        "world_size": 2,
        "vision": "ranks: 0-1, layout: {dp: 2}, recompute: full",
        "llm": "ranks: 0-1, layout: {pp: 2}, recompute: selective",
    },
    "sharded optimizer": {
        "world_size": 2,
        "more": "training: {format: fp32, sharding: optimizer}\n",
        "vision": "ranks: 0-1, layout: {dp: 2}",
        "llm": "ranks: 0-1, layout: {dp: 2}",
    },
}
WORDS: dict[str, tuple[str, ...]] = {
    "plain": (),
    "frozen tower": ("--freeze-ViT",),
    "frozen llm": ("--freeze-LM",),
    "class token dropped": ("--disable-vision-class-token",),
    "modern": MODERN,
}
# A few of the product: each of both at least once.
CASES = [(plan, "plain") for plan in PLANS] + [
    ("disjoint", "modern"),
    ("cp", "modern"),
    ("sequence parallel", "modern"),
    ("tp and pp", "modern"),
    ("nested", "frozen tower"),
    ("vision pp", "frozen tower"),
    ("partly overlapping", "frozen llm"),
    ("vision pp", "class token dropped"),
    ("vision sequence parallel", "class token dropped"),
    ("cp and sequence parallel", "class token dropped"),
]


def plan_of(name: str, directory: Path) -> str:
    settings = dict(PLANS[name])
    modules = {key: str(settings.pop(key)) for key in ("vision", "llm")}
    return write_plan(directory, modules, **settings)  # type: ignore[arg-type]


def require_same(parity: object) -> None:
    assert parity.loss_rel_err <= LOSS_TOLERANCE
    assert parity.ok, (parity.grad_rel_err_by_module, parity.sentences)


@needs_checkout
@pytest.mark.parametrize("plan", ["disjoint", "sequence parallel"])
def test_computes_what_one_process_computes(plan, tmp_path, monkeypatch):
    draw_images(monkeypatch)
    require_same(check(plan_of(plan, tmp_path)))


@needs_checkout
@pytest.mark.slow
@pytest.mark.parametrize(("plan", "words"), CASES)
def test_every_plan_computes_and_prints_what_one_process_does(plan, words, tmp_path, monkeypatch):
    draw_images(monkeypatch)
    keep_printed(monkeypatch, tmp_path)
    require_same(check(plan_of(plan, tmp_path), *WORDS[words], "--log-interval", "1"))
    world_size = PLANS[plan]["world_size"]
    ours, expected = read_printed(tmp_path, world_size), read_printed(tmp_path, 1)
    assert len(expected) == 2 and all(norm > 0.05 for _, norm in expected)
    for (loss, norm), (expected_loss, expected_norm) in zip(ours, expected, strict=True):
        assert loss == pytest.approx(expected_loss, rel=LOSS_TOLERANCE)
        assert norm == pytest.approx(expected_norm, abs=0.001 + 1e-9)


@needs_checkout
@pytest.mark.slow
@pytest.mark.parametrize("plan", PLANS)
def test_any_number_of_images_a_sample(plan, tmp_path, monkeypatch):
    any_number_of_images(monkeypatch, micro_batch_size=2)
    require_same(check(plan_of(plan, tmp_path), *EXTERNAL))


@needs_checkout
def test_images_of_another_sample_are_found(tmp_path, monkeypatch):
    """The negative control: the llm of one dp slot reads the other's images, and nothing else is changed."""
    from megatron_mosaic.adapters.llava import definition
    from megatron_mosaic.parallel_state_ext.boundaries.items import Links

    draw_images(monkeypatch)
    stock = definition.tokens.list_links

    def swapped(batch, images):
        links = stock(batch, images)
        return Links(
            links.source_items[::-1].copy(), links.source_starts, links.target_items, links.target_starts, links.rows
        )

    monkeypatch.setattr(definition.tokens, "list_links", swapped)
    parity = check(plan_of("disjoint", tmp_path))
    assert parity.loss_rel_err > 1e-5
    assert not parity.ok


@needs_checkout
@pytest.mark.parametrize(
    ("words", "where"),
    [
        (("--dataloader-type", "cyclic"), "--dataloader-type"),
        (("--tensor-model-parallel-size", "2"), "--tensor-model-parallel-size"),
        (("--use-packed-sequence",), "--use-packed-sequence"),
    ],
)
def test_what_the_plan_contradicts_is_refused(words, where, tmp_path, monkeypatch):
    with pytest.raises(MosaicError) as caught:
        check(plan_of("disjoint", tmp_path), *words)
    assert caught.value.where == where
