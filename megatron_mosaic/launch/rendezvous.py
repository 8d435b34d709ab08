"""torchrun's rendezvous for one host: a single store on the loopback interface.

Its own (`--standalone`) makes two stores, and both listen on every interface of the machine.
"""

from __future__ import annotations

from typing import Any

from torch.distributed import PrefixStore
from torch.distributed.elastic.rendezvous import (
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStoreInfo,
    rendezvous_handler_registry,
)

from megatron_mosaic.launch.store import LOOPBACK, RENDEZVOUS, listen, serve


class LocalRendezvous(RendezvousHandler):
    """One node, which is always complete; until it is `_closed`."""

    def __init__(self, parameters: RendezvousParameters) -> None:
        self._run_id, listener = parameters.run_id, listen()
        self._port, self._closed = listener.getsockname()[1], False
        self._store: Any = serve(listener)

    def get_backend(self) -> str:
        return RENDEZVOUS

    @property
    def use_agent_store(self) -> bool:
        return True

    def next_rendezvous(self) -> RendezvousInfo:
        return RendezvousInfo(PrefixStore("agent", self._store), 0, 1, RendezvousStoreInfo(LOOPBACK, self._port))

    def is_closed(self) -> bool:
        return self._closed

    def set_closed(self) -> None:
        self._closed = True

    def num_nodes_waiting(self) -> int:
        return 0

    def get_run_id(self) -> str:
        return self._run_id

    def shutdown(self) -> bool:
        self._closed = True
        return True


def register() -> None:
    """Let this torchrun know it by its name."""
    rendezvous_handler_registry.register(RENDEZVOUS, LocalRendezvous)
