"""The same MimoModel trained by megatron-core's own loop of several modules and by ours: losses, and times.

python scripts/bench_mimo.py [--rounds N] [--steps N] [--json]

Disjoint ranks, encoder first, dp degrees that divide: what both can do. gloo on this machine; megatron-core's parts are
those of the wheel (grids, MimoModel, its communicator, 1F1B, MimoOptimizer).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from megatron_mosaic.launch.forked import run_forked

SCRIPT = Path(__file__).with_name("pretrain_mimo.py")
LAYOUTS = {"1 -> 1": (1, 1), "2 -> 1": (2, 1), "1 -> 2": (1, 2), "2 -> 2": (2, 2)}  # dp of the encoder, of the llm
LENGTH, MICRO_BATCH, MICROBATCHES, LR, EPS = 64, 4, 4, 1e-3, 1e-3
HIDDEN, LAYERS, VISION_LAYERS, HEADS, SEED = 64, 4, 2, 4, 1234


def run_ours(plan_path: str, directory: str, steps: int) -> None:
    """On a rank."""
    from megatron_mosaic.adapters.script import run_script
    from megatron_mosaic.plan.plan_file import load_plan

    words = f"--num-layers {LAYERS} --hidden-size {HIDDEN} --num-attention-heads {HEADS} --seq-length {LENGTH}"
    words += f" --max-position-embeddings {LENGTH} --vision-num-layers {VISION_LAYERS} --train-iters {steps}"
    words += f" --lr {LR} --min-lr {LR} --lr-decay-style constant --adam-eps {EPS} --hidden-dropout 0"
    words += " --attention-dropout 0 --tokenizer-type NullTokenizer --vocab-size 127 --dataloader-type external"
    words += " --position-embedding-type rope --untie-embeddings-and-output-weights --eval-iters 0"
    words += f" --eval-interval 100000 --log-interval 100000 --seed {SEED} --mosaic-report {directory}"
    run_script(str(SCRIPT), words.split(), load_plan(plan_path))


def run_upstream(encoder_dp: int, llm_dp: int, directory: str, steps: int) -> None:
    """On a rank: megatron-core's loop, without megatron.training."""
    import torch
    import torch.distributed as dist
    from megatron.core import parallel_state

    from megatron_mosaic.parallel_state_ext.rebound.rebind import install_vision_norm
    from megatron_mosaic.runtime.layers.norms import TorchNorm

    install_vision_norm(TorchNorm)  # of both: CLIPViTModel cannot be built without Transformer Engine
    dist.init_process_group("gloo", rank=int(os.environ["RANK"]), world_size=int(os.environ["WORLD_SIZE"]))
    parallel_state._set_global_memory_buffer()
    loop = _Upstream(encoder_dp, llm_dp)
    seconds, losses = [], []
    for step in range(steps):
        dist.barrier()
        begin = time.perf_counter()
        losses.append(loop.step(step))
        dist.barrier()
        seconds.append(time.perf_counter() - begin)
    if dist.get_rank() == dist.get_world_size() - 1:
        Path(directory, "upstream.json").write_text(json.dumps({"losses": losses, "seconds": seconds}))
    assert not torch.isnan(torch.tensor(losses)).any()


class _Upstream:
    """megatron-core's parts on this rank, put together as its tests do: grids, model, optimizer, communicator."""

    def __init__(self, encoder_dp: int, llm_dp: int) -> None:
        import torch.distributed as dist
        from megatron.core.models.mimo.config.role import MIMO_LANGUAGE_MODULE_KEY as LANGUAGE
        from megatron.core.models.mimo.optimizer import get_mimo_optimizer
        from megatron.core.optimizer.optimizer_config import OptimizerConfig
        from megatron.core.pipeline_parallel.multimodule_communicator import MultiModulePipelineCommunicator
        from megatron.core.process_groups_config import MultiModuleProcessGroupCollection
        from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
        from pretrain_mimo import MODALITY

        model_parallel_cuda_manual_seed(SEED, tp_rank=0, ep_rank=0, etp_rank=0)
        self._rank, self._slots = dist.get_rank(), llm_dp
        grids = {MODALITY: build_grid(0, encoder_dp), LANGUAGE: build_grid(encoder_dp, llm_dp)}
        alone = [dist.new_group([rank]) for rank in range(dist.get_world_size())][self._rank]
        self._name = MODALITY if self._rank < encoder_dp else LANGUAGE
        self._groups = collect_groups(grids[self._name], alone)
        self._llm_dp_cp = grids[LANGUAGE].get_pg(["dp", "cp"]) if self._name == LANGUAGE else None
        self._first_llm = encoder_dp
        self.model = build_model(grids, self._groups, self._name)
        config = OptimizerConfig(optimizer="adam", lr=LR, min_lr=LR, weight_decay=0.01, clip_grad=1.0, adam_eps=EPS)
        self._optimizer = get_mimo_optimizer(self.model, config)
        topology = {MODALITY: [LANGUAGE], LANGUAGE: []}
        self._communicator = MultiModulePipelineCommunicator(
            grids, topology, self.model.config, dim_mapping={"s": 0, "h": 2, "b": 1}, module_output_ndim={MODALITY: 2}
        )
        own = LANGUAGE if self._name == LANGUAGE else None
        self._collection = MultiModuleProcessGroupCollection(
            module_pgs={self._name: self._groups}, language_model_module_name=own
        )
        self.model.config.finalize_model_grads_func = self._finalize
        self.model.config.grad_scale_func = lambda loss: loss
        place = self._rank if self._name == MODALITY else self._rank - encoder_dp
        size = MICRO_BATCH * llm_dp // (encoder_dp if self._name == MODALITY else llm_dp)
        self._own = range(place * size, (place + 1) * size)

    def step(self, number: int) -> float:
        """Train one step; its loss, on llm ranks."""
        import torch
        import torch.distributed as dist
        from megatron.core.pipeline_parallel.schedules import forward_backward_pipelining_without_interleaving

        self._optimizer.zero_grad()
        self.model.zero_grad_buffer()
        found = forward_backward_pipelining_without_interleaving(
            forward_step_func=self._forward,
            data_iterator=self._blocks(number),
            model=[self.model],
            num_microbatches=MICROBATCHES,
            seq_length=LENGTH,
            micro_batch_size=MICRO_BATCH,
            p2p_communicator=self._communicator,
            pg_collection=self._collection,
        )
        self._optimizer.step()
        sums = torch.stack([each["sums"] for each in found if "sums" in each] or [torch.zeros(2)]).sum(0)
        dist.all_reduce(sums)
        return float(sums[0] / sums[1])

    def _blocks(self, number: int) -> Iterator[dict[str, Any]]:
        from pretrain_mimo import draw_block

        for microbatch in range(MICROBATCHES):
            start = (number * MICROBATCHES + microbatch) * MICRO_BATCH * self._slots
            yield draw_block([start + own for own in self._own], LENGTH)

    def _forward(self, iterator: Iterator[dict[str, Any]], model: Any) -> tuple[Any, Any]:
        output, mask = model(**next(iterator))
        return output, partial(self._sum, mask)

    def _sum(self, mask: Any, output: Any) -> tuple[Any, Any, dict[str, Any]]:
        import torch

        if isinstance(output, dict):
            return torch.zeros((), requires_grad=True), torch.zeros((), dtype=torch.int), {}
        total, count = (output.float() * mask).sum(), mask.sum()
        return total, count.to(torch.int), {"sums": torch.stack([total.detach(), count])}

    def _finalize(self, _: Any, num_tokens: Any, force_all_reduce: bool = False, **__: Any) -> None:
        """Sum each module's gradients in its own groups, and divide all by the loss tokens of the whole batch."""
        import torch
        import torch.distributed as dist
        from megatron.core.distributed.finalize_model_grads import finalize_model_grads

        count = num_tokens.float().sum().view(1) if self._llm_dp_cp is not None else torch.zeros(1)
        dist.all_reduce(count)
        for module in self.model._active_ddp_modules():
            finalize_model_grads([module], num_tokens=None, pg_collection=self._groups)
            module.scale_gradients(1.0 / float(count))


def build_grid(offset: int, dp: int) -> Any:
    """megatron-core's grid of one module with dp alone."""
    from megatron.core.hyper_comm_grid import HyperCommGrid

    names = ["tp", "cp", "pp", "dp"]
    grid = HyperCommGrid(shape=[1, 1, 1, dp], dim_names=names, rank_offset=offset, backend="gloo")
    expert = ["expt_tp", "ep", "pp", "expt_dp"]
    grid.register_view("expert", shape=[1, 1, 1, dp], dim_names=expert, shared_dims=["pp"])
    for dims in (["tp"], ["cp"], ["pp"], ["dp"], ["dp", "cp"], ["tp", "pp"], ["tp", "cp", "dp", "pp"]):
        grid.create_pg(dims)
    for dims in (["ep"], ["expt_dp"], ["expt_tp"], ["expt_tp", "ep", "pp"]):
        grid.create_pg(dims, view="expert")
    return grid


def collect_groups(grid: Any, alone: Any) -> Any:
    """The groups of this rank's module."""
    from megatron.core.process_groups_config import ProcessGroupCollection

    expert = partial(grid.get_pg, view="expert")
    return ProcessGroupCollection(
        tp=grid.get_pg("tp"),
        cp=grid.get_pg("cp"),
        pp=grid.get_pg("pp"),
        dp=grid.get_pg("dp"),
        dp_cp=grid.get_pg(["dp", "cp"]),
        mp=grid.get_pg(["tp", "pp"]),
        intra_dist_opt=grid.get_pg(["tp", "cp", "dp", "pp"]),
        ep=expert("ep"),
        expt_tp=expert("expt_tp"),
        expt_dp=expert("expt_dp"),
        tp_ep_pp=expert(["expt_tp", "ep", "pp"]),
        embd=alone,
        pos_embd=alone,
    )


def build_model(grids: Mapping[str, Any], groups: Any, own: str) -> Any:
    """This rank's module of the MimoModel, weights drawn by name as ours are, in its own gradient buffers."""
    import torch
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.models.mimo import MimoModel, MimoModelConfig
    from megatron.core.transformer.transformer_config import TransformerConfig
    from pretrain_mimo import IMAGE_TOKEN, MODALITY, build_language, build_modality

    from megatron_mosaic.parity.scripts.weights import draw, of_adapter

    language = TransformerConfig(
        num_layers=LAYERS,
        hidden_size=HIDDEN,
        num_attention_heads=HEADS,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bias_dropout_fusion=False,
        use_cpu_initialization=True,
        variable_seq_lengths=True,
        moe_token_dispatcher_type="alltoall",  # what Megatron asks for with it
        pipeline_dtype=torch.float32,
        calculate_per_token_loss=True,
    )
    given = {"pg_collection": groups}
    config = MimoModelConfig(
        language_model_spec=build_language(language, LENGTH, pre_process=True, post_process=True, **given),
        modality_submodules_spec={MODALITY: build_modality(HIDDEN, VISION_LAYERS, **given)},
        special_token_ids={MODALITY: IMAGE_TOKEN},
        module_to_grid_map=dict(grids),
    )
    model = MimoModel(config)
    draw(of_adapter([model]), SEED)
    buffers = DistributedDataParallelConfig(overlap_grad_reduce=False, use_distributed_optimizer=False)
    if own == MODALITY:
        part = model.modality_submodules[MODALITY]
        encoder = part.encoders["clip"].config
        model.modality_submodules[MODALITY] = DistributedDataParallel(encoder, buffers, part, pg_collection=groups)
    else:
        model.language_model = DistributedDataParallel(language, buffers, model.language_model, pg_collection=groups)
    return model


def compare(name: str, steps: int, rounds: int) -> dict[str, Any]:
    """Losses of both, and the ratio of their steps' medians in every round, ours over upstream's."""
    encoder_dp, llm_dp = LAYOUTS[name]
    world_size = encoder_dp + llm_dp
    ratios, largest = [], 0.0
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as directory:
            plan = Path(directory, "plan.yaml")
            batch = MICRO_BATCH * MICROBATCHES * llm_dp
            plan.write_text(
                f"mosaic_plan: 1\nworkload: mimo\nworld_size: {world_size}\nglobal_batch_size: {batch}\n"
                f"micro_batch_size: {MICRO_BATCH}\nschedule: 1f1b\nmodules:\n"
                f"  images: {{ranks: 0-{encoder_dp - 1}, layout: {{dp: {encoder_dp}}}}}\n"
                f"  llm: {{ranks: {encoder_dp}-{world_size - 1}, layout: {{dp: {llm_dp}}}}}\n"
            )
            run_forked(world_size, run_upstream, encoder_dp, llm_dp, directory, steps)
            run_forked(world_size, run_ours, str(plan), directory, steps)
            theirs = json.loads(Path(directory, "upstream.json").read_text())
            lines = Path(directory, "losses.jsonl").read_text().splitlines()
            ours = [json.loads(line)["lm loss"] for line in lines]
            seconds = json.loads(Path(directory, "timeline.json").read_text())["seconds"]
        pairs = zip(ours, theirs["losses"], strict=True)
        largest = max(largest, *(abs(a - b) / abs(b) for a, b in pairs))
        ratios.append(statistics.median(seconds[1:]) / statistics.median(theirs["seconds"][1:]))
    return {"layout": name, "loss_rel_diff": largest, "losses": ours, "ratios": ratios}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--layout", choices=LAYOUTS, action="append")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    from megatron_mosaic.adapters import stock  # noqa: F401  forked ranks inherit it
    from megatron_mosaic.parallel_state_ext.rebound import cpu
    from megatron_mosaic.runtime import train  # noqa: F401

    cpu.install()
    sys.path.insert(0, str(SCRIPT.parent))
    rows = [compare(name, given.steps, given.rounds) for name in given.layout or LAYOUTS]
    if given.json:
        print(json.dumps(rows))
        return
    print("| dp of encoder -> llm | losses differ by | step, ours / megatron-core's, by round |\n|---|---|---|")
    for row in rows:
        print(f"| {row['layout']} | {row['loss_rel_diff']:.1e} | {', '.join(f'{r:.2f}' for r in row['ratios'])} |")


if __name__ == "__main__":
    main()
