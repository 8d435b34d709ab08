"""A script's data as global microbatches: blocks of `micro_batch_size` samples, each as one process would get it.

    dataset  --micro_batch_size consecutive samples, torch's default collation-->  block --\
    iterator (--dataloader-type external): what it yields is a block                --------> [block, ...] of every
                                                                                              dp slot of the backbone
Every rank reads all of them, so the global batch is the same under every plan.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch.utils.data import default_collate

from megatron_mosaic.adapters.single_process import SingleProcess
from megatron_mosaic.plan import Plan

Block = Any  # what a script's data iterator yields on one process


@dataclass(frozen=True, slots=True, kw_only=True)
class ScriptData:
    """The script's provider of datasets, as `pretrain()` wants one."""

    args: argparse.Namespace
    alone: SingleProcess
    provider: Callable[[Any], Sequence[Any]]
    samples_per_block: int
    blocks_per_microbatch: int
    is_distributed: ClassVar[bool] = True  # asked for by Megatron: to be called on every rank

    @classmethod
    def of(cls, args: argparse.Namespace, plan: Plan, backbone: str, alone: SingleProcess, provider: Any) -> ScriptData:
        """For the plan's batch."""
        return cls(
            args=args,
            alone=alone,
            provider=provider,
            samples_per_block=plan.micro_batch_size,
            blocks_per_microbatch=plan.modules[backbone].layout.dp,
        )

    def __call__(self, num_samples: Any) -> Sequence[Iterator[Sequence[Block]] | None]:
        """Iterators over (train, valid, test)."""
        with self.alone():
            found = self.provider(num_samples)
        starts = (self.args.consumed_train_samples, self.args.consumed_valid_samples, 0)
        return tuple(
            None if data is None else self._grouped(self._blocks(data, start))
            for data, start in zip(found, starts, strict=True)
        )

    def _grouped(self, blocks: Iterator[Block]) -> Iterator[Sequence[Block]]:
        while True:
            try:
                group = [next(blocks) for _ in range(self.blocks_per_microbatch)]
            except StopIteration:
                return
            yield group

    def _blocks(self, data: Any, start: int) -> Iterator[Block]:
        if not hasattr(data, "__getitem__"):
            yield from data
            return
        while True:
            yield default_collate([data[i % len(data)] for i in range(start, start + self.samples_per_block)])
            start += self.samples_per_block
