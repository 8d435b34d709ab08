"""torchrun on one node of a Slurm job, started by `srun`, one task a node: ranks follow the order of nodes.

`python -m megatron_mosaic.launch.slurm.node WORLD_SIZE RANKS_PER_NODE SHUTDOWN_S SCRIPT...`. Rendezvous is static: the
rank order of torchrun's other kinds is free, and a plan's is not. The last node may have fewer ranks than the others.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence

_WORKER = "megatron_mosaic.launch.worker"


def torchrun_words(words: Sequence[str], environment: Mapping[str, str]) -> list[str]:
    """torchrun's arguments on this node."""
    world_size, ranks_per_node, shutdown_s = map(int, words[:3])
    node = int(environment["SLURM_NODEID"])
    return [
        f"--nnodes={environment['SLURM_STEP_NUM_NODES']}",
        f"--node-rank={node}",
        f"--nproc-per-node={min(ranks_per_node, world_size - node * ranks_per_node)}",
        f"--master-addr={environment['MASTER_ADDR']}",
        f"--master-port={environment['MASTER_PORT']}",
        f"--shutdown-timeout={shutdown_s}",
        "-m",
        _WORKER,
        *words[3:],
    ]


def main(words: Sequence[str]) -> int:
    """Run torchrun. 143 and the like where a signal ended it; what its ranks ended with, they leave themselves."""
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    try:
        run.main(torchrun_words(words, os.environ))
    except ChildFailedError as error:
        print(error, file=sys.stderr)
        return 1
    except SignalException as told:
        return 128 + told.sigval
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
