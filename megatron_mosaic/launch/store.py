"""The store through which the ranks of a local job meet: in their launcher, and heard on this machine alone.

torch's own listens on every interface of the machine, whatever address it is given.
"""

from __future__ import annotations

import socket
import sys
from datetime import timedelta

LOOPBACK = "127.0.0.1"
RENDEZVOUS = "mosaic-local"  # torchrun knows the store by this name: rendezvous.py
_BACKLOG = 4096  # ranks that knock before the store serves


def listen() -> socket.socket:
    """A socket that listens on the loopback interface, at a free port."""
    listener = socket.socket()
    listener.bind((LOOPBACK, 0))
    listener.listen(_BACKLOG)
    return listener


def serve(listener: socket.socket, timeout: timedelta = timedelta(minutes=5)) -> object:
    """The store behind the socket, which it takes over; it serves as long as it is kept."""
    from torch.distributed import TCPStore

    port = listener.getsockname()[1]
    return TCPStore(LOOPBACK, port, None, True, timeout, False, master_listen_fd=listener.detach())


def environment(port: int) -> dict[str, str]:
    """What tells local ranks to meet there, and to connect to each other on the loopback interface."""
    found = {"MASTER_ADDR": LOOPBACK, "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    found |= {"TORCHELASTIC_RESTART_COUNT": "0"}  # some versions of torch make it a part of every key
    return found | interfaces()


def interfaces() -> dict[str, str]:
    """The interface that gloo and NCCL use. Only Linux calls it by this name."""
    return {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}
