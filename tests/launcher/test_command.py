"""The argv that starts ranks."""

import socket
import sys

import pytest

from launcher.command import rendezvous_port, torchrun_command
from sharding.errors import UserError


def test_golden_argv() -> None:
    assert torchrun_command("configs/x.yaml", ["steps=20", "optimizer.lr=1e-3"], 4, 29500) == [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nnodes=1",
        "--nproc-per-node=4",
        "--master-addr=127.0.0.1",
        "--master-port=29500",
        "--max-restarts=0",
        "--signals-to-handle=SIGQUIT",
        "-m",
        "trainer",
        "configs/x.yaml",
        "steps=20",
        "optimizer.lr=1e-3",
    ]


def test_zero_is_a_free_port_and_a_free_port_stays() -> None:
    port = rendezvous_port(0)
    assert port > 0
    assert rendezvous_port(port) == port


@pytest.mark.parametrize("address", ["127.0.0.1", "0.0.0.0"])
def test_a_port_in_use_is_named(address: str) -> None:
    with socket.create_server((address, 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(UserError, match=rf"launch.master_port={port} cannot be used \(Address already in use\)"):
            rendezvous_port(port)
