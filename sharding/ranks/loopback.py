"""A rendezvous store that the machine's other users, at least those elsewhere, cannot reach.

torch's TCPStore listens on all interfaces, whatever host it is told, and trusts whoever connects: it is where ranks
learn one another's addresses, and what they send each other later may be objects that are unpickled.

``python -m sharding.ranks.loopback MODULE [ARGUMENT ...]`` runs a launcher's module, such as
``torch.distributed.run``, with such a store in its agent.
"""

import runpy
import socket
import sys
from typing import Any

from torch.distributed import TCPStore

HOSTS = ("127.0.0.1", "localhost", "::1")
_BACKLOG = 2048


def loopback_store(host: str, port: int, world_size: int, is_master: bool, *arguments: Any, **options: Any) -> TCPStore:
    """A TCPStore of torch, with the same arguments; its server listens on the loopback interface if the host is there.

    Raises:
        OSError: the port is in use.
    """
    if is_master and host in HOSTS:
        address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(address[0], socket.SOCK_STREAM) as server:
            # As torch does: connections of an earlier run that are closing do not count.
            server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            server.bind(address[4])
            server.listen(_BACKLOG)
            options["master_listen_fd"] = server.detach()
    return TCPStore(host, port, world_size, is_master, *arguments, **options)


def main() -> None:
    """Run the module named first as ``python -m`` would, with the rest as its arguments."""
    from torch.distributed.elastic.rendezvous import static_tcp_rendezvous

    static_tcp_rendezvous.TCPStore = loopback_store  # type: ignore[misc, assignment]
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
