"""A flag that the table calls honoured changes what is built: the loss of one batch, or the configuration.

Each loss is that of a whole model on one process; the default model's is the control.
"""

import pytest
import torch

from megatron_mosaic.any2any import data
from megatron_mosaic.any2any.arguments import mix_from_args, sizes_from_args, workload_from_args
from megatron_mosaic.any2any.definition import Any2Any
from megatron_mosaic.errors import ConfigError
from megatron_mosaic.parity.reference import ALONE
from megatron_mosaic.runtime.model import initialize_by_name
from tests.any2any.conftest import forward_all, groups_of, mean_loss, parse_default_args

ROPE = ["--position-embedding-type", "rope"]


def build(*words):
    args = parse_default_args(*words)
    model = Any2Any.from_args(args, workload_from_args(args))
    stages = {}
    for name in model.workload.by_name:
        stage = model.build_stage(name, ALONE, 0, groups_of(torch.distributed.group.WORLD))
        stage.pg_collection = groups_of(torch.distributed.group.WORLD)
        initialize_by_name(stage, name, args.seed)
        stages[name] = [stage]
    return args, model, stages


def losses_by_module(*words) -> dict[str, float]:
    args, model, stages = build(*words)
    dataset = data.DigitsDataset("train", sizes=sizes_from_args(args), mix=mix_from_args(args), num_samples=8, seed=1)
    with torch.no_grad():
        outputs = forward_all(model, stages, data.collate([dataset[i] for i in range(8)]))
    return {"all": mean_loss(outputs).item(), "vision": outputs["vision"].exports["llm"].double().sum().item()}


@pytest.fixture(scope="module")
def default(one_rank):
    return losses_by_module()


@pytest.mark.parametrize(
    ("words", "in_vision"),
    [
        (["--swiglu"], True),
        (["--squared-relu"], True),
        (["--quick-geglu"], True),
        (["--normalization", "RMSNorm"], True),
        (["--norm-epsilon", "0.1"], True),
        (["--softmax-type", "off-by-one"], True),
        (["--init-method-std", "0.05"], True),
        (["--group-query-attention", "--num-query-groups", "2"], False),
        (["--group-query-attention"], False),
        (["--kv-channels", "24"], False),
        (ROPE, False),
        (["--use-rotary-position-embeddings"], False),
        (["--position-embedding-type", "none"], False),
        ([*ROPE, "--rotary-base", "500"], False),
        ([*ROPE, "--rotary-percent", "0.5"], False),
        ([*ROPE, "--rotary-interleaved"], False),
        ([*ROPE, "--rotary-seq-len-interpolation-factor", "2"], False),
        ([*ROPE, "--use-rope-scaling"], False),
        (["--seed", "5"], True),
    ],
)
def test_a_flag_changes_the_loss(words, in_vision, default) -> None:
    found = losses_by_module(*words)
    before = losses_by_module(*ROPE) if words[:2] == ROPE and len(words) > 2 else default
    assert found["all"] != pytest.approx(before["all"], rel=1e-6)
    assert (found["vision"] != default["vision"]) == in_vision, "the docs say which modules a flag reaches"


@pytest.mark.parametrize(
    ("words", "name", "value"),
    [
        (["--disable-bias-linear"], "add_bias_linear", False),
        (["--disable-bias-linear", "--add-qkv-bias"], "add_qkv_bias", True),
        (["--apply-query-key-layer-scaling"], "apply_query_key_layer_scaling", True),
        (["--attention-softmax-in-fp32"], "attention_softmax_in_fp32", True),
        (["--hidden-dropout", "0.2"], "hidden_dropout", 0.2),
        (["--attention-dropout", "0.2"], "attention_dropout", 0.2),
        (["--moe-router-score-function", "sigmoid"], "moe_router_score_function", "sigmoid"),
        (["--moe-router-topk-scaling-factor", "2"], "moe_router_topk_scaling_factor", 2.0),
        (["--moe-router-dtype", "fp64"], "moe_router_dtype", "fp64"),
        (["--moe-input-jitter-eps", "0.1"], "moe_input_jitter_eps", 0.1),
        (["--moe-router-pre-softmax"], "moe_router_pre_softmax", True),
        (["--bf16"], "bf16", True),
    ],
)
def test_a_flag_reaches_every_module(words, name, value, default) -> None:
    _, _, stages = build(*words)
    for module, (stage,) in stages.items():
        assert getattr(stage.config, name) == value, module
    if name == "add_bias_linear":
        assert not [n for n, _ in stages["llm"][0].named_parameters() if "linear" in n and n.endswith("bias")]


def test_the_backbone_learns_as_many_positions_as_asked_for(default) -> None:
    for words, rows in (([], 64), (["--seq-length", "96"], 96), (["--max-position-embeddings", "100"], 100)):
        _, _, stages = build(*words)
        assert len(stages["llm"][0].embedding.position_embeddings.weight) == rows
    _, _, stages = build(*ROPE)
    assert not hasattr(stages["llm"][0].embedding, "position_embeddings")


@pytest.mark.parametrize(
    ("words", "where"),
    [
        (["--group-query-attention", "--num-query-groups", "3"], "--num-query-groups"),
        ([*ROPE, "--rotary-percent", "0.3", "--kv-channels", "10"], "--rotary-percent"),
        (["--transformer-impl", "transformer_engine"], "--transformer-impl"),
        (["--hidden-size", "66"], "module 'llm': num_heads"),
        (["--swiglu", "--squared-relu"], "--squared-relu"),
    ],
)
def test_layers_that_cannot_be_built_are_refused_by_name(words, where, one_rank) -> None:
    with pytest.raises(ConfigError) as caught:
        build(*words)
    assert caught.value.where == where
