"""Trains the model of model.py under a plan, through Megatron's own pretrain().

torchrun --nproc-per-node 4 examples/own_model/train.py --mosaic-plan examples/own_model/plan.yaml --train-iters 60
"""

import sys
from dataclasses import replace
from pathlib import Path

import torch
from megatron.core.enums import ModelType
from megatron.training import pretrain
from model import ROWS, SensorReader

from megatron_mosaic.any2any.arguments import MEGATRON_DEFAULTS
from megatron_mosaic.any2any.pretrain import forward_step
from megatron_mosaic.errors import ConfigError, PlanError
from megatron_mosaic.plan.workload_file import load_workload_file
from megatron_mosaic.runtime.arguments import parse_and_validate_args
from megatron_mosaic.runtime.train import Runtime

WORKLOAD = load_workload_file(Path(__file__).with_name("model.yaml"))
LLM = WORKLOAD.backbone
# Megatron's arguments describe the backbone; a command line may change what is not in the model file.
DEFAULTS = MEGATRON_DEFAULTS | {
    "num_layers": LLM.num_layers,
    "hidden_size": LLM.hidden_size,
    "num_attention_heads": LLM.num_heads,
    "ffn_hidden_size": LLM.ffn_hidden_size,
    "seq_length": LLM.tokens_per_item,
    "max_position_embeddings": LLM.tokens_per_item,
    "vocab_size": LLM.vocab_size,
    "log_interval": 1,
}
BEGIN, PLACE = 4, 5  # words; 0-3 are answers


class Readings(torch.utils.data.Dataset):
    """Sample i is a pure function of the split and i: every rank reads the same."""

    def __init__(self, split, num_samples):
        self.split, self.num_samples = split, num_samples

    def __len__(self):
        return self.num_samples

    def __getitem__(self, i):
        draw = torch.Generator().manual_seed(3 * i + ("train", "valid", "test").index(self.split))
        readings = torch.randn(ROWS, WORKLOAD.by_name["sensor"].input_size, generator=draw)
        text = torch.cat([torch.tensor([PLACE] * ROWS + [BEGIN]), readings.argmax(1)])
        loss_mask = torch.tensor([0.0] * ROWS + [1.0] * ROWS)  # the answers
        return {"readings": readings, "tokens": text[:-1], "labels": text[1:], "loss_mask": loss_mask}


def collate(samples):
    return {key: torch.stack([sample[key] for sample in samples]) for key in samples[0]}


def make_datasets(counts):
    return tuple(Readings(split, max(1, count or 1)) for split, count in zip(("train", "valid", "test"), counts))


def workload_of(args):
    return replace(WORKLOAD, global_batch_size=args.global_batch_size or 1)


def main():
    args, plan = parse_and_validate_args(workload_of, lambda parser: parser, DEFAULTS)
    runtime = Runtime(args, plan, SensorReader(args, workload_of(args)), collate)
    provider = runtime.data_provider(make_datasets)
    with runtime.finishing():
        pretrain(runtime.container, provider, ModelType.encoder_or_decoder, forward_step, **runtime.seams)


if __name__ == "__main__":
    try:
        main()
    except (ConfigError, PlanError) as error:  # where, got, expected, fix: for whoever wrote the plan or the words
        print(error, file=sys.stderr)
        sys.exit(2)
