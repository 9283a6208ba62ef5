"""The command line that starts the ranks of this machine."""

import socket
import sys
from collections.abc import Sequence

from sharding.errors import UserError

_HOST = "127.0.0.1"


def torchrun_command(config_path: str, overrides: Sequence[str], num_ranks: int, port: int) -> list[str]:
    """Ranks under torch's elastic launcher, in this interpreter.

    Args:
        config_path: the run's configuration file.
        overrides: ``key=value`` arguments.
        num_ranks: ranks on this machine.
        port: TCP port of the rendezvous, on the loopback interface alone.
    """
    return [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nnodes=1",
        f"--nproc-per-node={num_ranks}",
        f"--master-addr={_HOST}",
        f"--master-port={port}",
        "--max-restarts=0",
        # The agent would end its ranks at a SIGTERM or SIGINT; launcher.child has it ignore both, and it must not take
        # them up again.
        "--signals-to-handle=SIGQUIT",
        "-m",
        "trainer",
        config_path,
        *overrides,
    ]


def rendezvous_port(configured: int) -> int:
    """The configured port if nobody listens there, or a free one for 0.

    Raises:
        UserError: the configured port is in use.
    """
    with socket.socket() as probe:
        # Ports of connections that closed a moment ago may be used again, as the rendezvous itself does.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            # All interfaces, as the rendezvous store does.
            probe.bind(("", configured))
        except OSError as error:
            raise UserError(
                f"launch.master_port={configured} cannot be used ({error.strerror}); "
                "choose another, or 0 for a free one."
            ) from None
        return probe.getsockname()[1]
