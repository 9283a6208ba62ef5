"""The TCP port at which the ranks of a Slurm job meet: chosen on the first node, handed to all by the batch script."""

import socket
from collections.abc import Mapping

from sharding.ranks.errors import RunFailure, UserError
from sharding.ranks.slurm_step import job_port
from trainer.config import RunConfig

# As far as the ports of one job lie from those of the next.
_NUM_PORTS = 31


def meeting_port(config: RunConfig, environment: Mapping[str, str]) -> int:
    """The user's own port, or else the job's first one that nobody listens on; call it on the first node.

    Another process may hold the job's usual port, a rank of a dead attempt too: each restart asks again.

    Args:
        config: ``launch.master_port`` is read here.
        environment: the job's; MASTER_PORT is the user's own, or that of the attempt before.

    Raises:
        UserError: the user's own port is taken.
        RunFailure: all of the job's are.
    """
    job_id = int(environment["SLURM_JOB_ID"])
    candidates = [job_port(job_id, number) for number in range(_NUM_PORTS)]
    name, own = "MASTER_PORT", environment.get("MASTER_PORT", "")
    if not own and config.launch.master_port:
        name, own = "launch.master_port", str(config.launch.master_port)
    if own and not own.isdigit():
        raise UserError(f"{name}={own} is not a number; set it to a TCP port, or unset it.")
    if own and int(own) not in candidates:
        if not _is_free(int(own)):
            raise UserError(
                f"{name}={own} is taken on {socket.gethostname()}, where the ranks are to meet; choose another, or "
                "unset it for one of the job's own."
            )
        return int(own)
    for port in candidates:
        if _is_free(port):
            return port
    raise RunFailure(
        f"the ports {candidates[0]} to {candidates[-1]} are all taken on {socket.gethostname()}; set "
        "launch.master_port to one that is free."
    )


def _is_free(port: int) -> bool:
    """Whether a rendezvous could listen there, on all interfaces as torch's does."""
    families = [socket.AF_INET, *([socket.AF_INET6] if socket.has_dualstack_ipv6() else [])]
    try:
        for family in families:
            # Connections that closed a moment ago do not count, as for torch: SO_REUSEADDR is set.
            socket.create_server(("", port), family=family, dualstack_ipv6=family == socket.AF_INET6).close()
    except (OSError, OverflowError):
        return False
    return True
