"""A model of your own as a ModelDefinition: an MLP that reads sensors, and a GPT that speaks about them.

readings [items, 4, 4] --sensor--> 4 rows an item --> places 0-3 of llm's text --> the largest of each row
"""

import numpy as np
import torch
from megatron.core.transformer import MegatronModule
from torch import nn

from megatron_mosaic.any2any.blocks import config_from_args, split_over_tp
from megatron_mosaic.any2any.positions import Positions
from megatron_mosaic.any2any.stages import BackboneStage
from megatron_mosaic.definition import StageOutput
from megatron_mosaic.parallel_state_ext.boundaries.items import Items, Links

ROWS = 4  # of an item


class SensorStage(MegatronModule):
    """Readings [rows, items, values] -> rows for the backbone. Any module will do, of any layers."""

    def __init__(self, config, sizes):
        super().__init__(config)
        width = sizes.hidden_size
        self.layers = nn.Sequential(nn.Linear(sizes.input_size, width), nn.GELU(), nn.Linear(width, sizes.output_size))
        split_over_tp(self.layers, config)  # each tp rank has its own rows under sequence parallelism

    def forward(self, inputs):
        rows = self.layers(inputs.tensors["readings"])
        return StageOutput(exports={name: rows[at] for name, at in inputs.exports_at.items()})


class SensorReader:
    """What the runtime asks of a model: stages, items, links, tensors. It never sees a rank."""

    loss_names = ("lm loss",)

    def __init__(self, args, workload):
        self.args, self.workload = args, workload

    def build_stage(self, module, placed, stage, pg_collection, chunk=0):
        sizes, layout = self.workload.by_name[module], placed.layout
        config = config_from_args(self.args, sizes, placed)
        if module == "sensor":
            assert layout.pp == 1, "an MLP is not cut into stages"
            return SensorStage(config, sizes)
        ends = {"is_first": (stage, chunk) == (0, 0), "is_last": (stage, chunk) == (layout.pp - 1, layout.vpp - 1)}
        return BackboneStage(config, sizes, **ends, chunk=chunk, pg_collection=pg_collection, positions=Positions())

    def list_items(self, batch):
        samples, length = batch["tokens"].shape
        lengths = {"sensor": ROWS, "llm": length}
        return {name: Items(np.arange(samples), np.full(samples, tokens)) for name, tokens in lengths.items()}

    def list_links(self, edge, batch):
        samples = np.arange(len(batch["tokens"]))  # rows 0-3 of its item go to places 0-3 of a sample
        return Links(samples, 0 * samples, samples, 0 * samples, np.full_like(samples, ROWS))

    def select_inputs(self, module, batch, shard):
        items, tokens = torch.tensor(shard.items, dtype=torch.long), torch.from_numpy(shard.cp_tokens)
        if module == "sensor":
            return {"readings": batch["readings"][items][:, shard.tokens].transpose(0, 1)}
        text = {"tokens": batch["tokens"], "labels": batch["labels"], "weights": batch["loss_mask"]}
        return {"positions": tokens} | {name: values[items][:, tokens] for name, values in text.items()}
