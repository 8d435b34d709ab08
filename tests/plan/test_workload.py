"""The workload's constructor refuses what cannot be planned, and its digest names what plans depend on."""

from dataclasses import replace

import pytest

from megatron_mosaic.errors import ConfigError
from megatron_mosaic.plan.workload import Edge, Role, Workload
from tests.cases import EDGES, GENERATOR, LLM, VISION, WORKLOAD


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"name": "Vision"}, "module 'Vision'"),
        ({"num_layers": 0}, "num_layers"),
        ({"items_per_sample": 0.0}, "items_per_sample"),
        ({"num_heads": 3}, "num_heads"),
        ({"num_query_groups": 3}, "num_query_groups"),
    ],
)
def test_module_refuses(change, where):
    with pytest.raises(ConfigError) as caught:
        replace(VISION, **change)
    assert where in caught.value.where
    assert caught.value.fix


@pytest.mark.parametrize(
    ("modules", "edges", "batch", "where"),
    [
        ((LLM, LLM), (), 1, "modules"),
        ((), (), 1, "modules"),
        ((VISION,), (), 1, "backbone"),
        ((LLM, replace(LLM, name="other")), (), 1, "backbone"),
        ((VISION, LLM), (Edge(source="vision", target="audio", rows_per_item=1, width=1),), 1, "vision->audio"),
        ((LLM, VISION), (EDGES[0],), 1, "vision->llm"),
        ((LLM,), (), 0, "global_batch_size"),
    ],
)
def test_workload_refuses(modules, edges, batch, where):
    with pytest.raises(ConfigError, match=where):
        Workload(name="w", modules=modules, edges=edges, global_batch_size=batch)


def test_edge_refuses_empty_rows():
    with pytest.raises(ConfigError, match="rows_per_item"):
        Edge(source="a", target="b", rows_per_item=0, width=1)


def test_properties():
    assert WORKLOAD.backbone is LLM
    assert WORKLOAD.by_name["generator"] is GENERATOR
    assert WORKLOAD.edge_pairs == (("vision", "llm"), ("llm", "generator"))
    assert [WORKLOAD.items_of(edge) for edge in EDGES] == ["vision", "generator"]
    assert (LLM.query_groups, LLM.head_size) == (4, 16)
    assert replace(LLM, num_query_groups=2).query_groups == 2


def test_digest_follows_sizes_but_not_the_batch():
    assert replace(WORKLOAD, global_batch_size=99).digest == WORKLOAD.digest
    counted = tuple(replace(m, items_per_sample=3.0) if m.role is not Role.backbone else m for m in WORKLOAD.modules)
    assert replace(WORKLOAD, modules=counted).digest == WORKLOAD.digest
    wider = (replace(VISION, ffn_hidden_size=512), LLM, GENERATOR)
    assert replace(WORKLOAD, modules=wider).digest != WORKLOAD.digest
    assert replace(WORKLOAD, edges=EDGES[:1]).digest != WORKLOAD.digest
