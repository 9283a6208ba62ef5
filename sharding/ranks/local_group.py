"""A group of ranks on this machine that no launcher starts: where they meet, and how each knows its place.

Imports no torch.
"""

import os
import socket

_HOST = "127.0.0.1"


def free_port() -> int:
    """A TCP port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind((_HOST, 0))
        port: int = probe.getsockname()[1]
        return port


def rank_variables(rank: int, num_ranks: int, port: int) -> dict[str, str]:
    """What torchrun would set for a rank.

    Args:
        rank: its number.
        num_ranks: of the group.
        port: of the group's rendezvous.
    """
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(num_ranks),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(num_ranks),
        "MASTER_ADDR": _HOST,
        "MASTER_PORT": str(port),
    }


def become_rank(rank: int, num_ranks: int, port: int) -> None:
    """Make this process one of the ranks of a group, in its environment; see ``rank_variables``."""
    os.environ |= rank_variables(rank, num_ranks, port)
