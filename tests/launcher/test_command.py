"""The argv that starts ranks."""

import base64
import socket
import sys

import pytest

from launcher.command import (
    accelerate_command,
    deepspeed_command,
    find_launcher,
    rank_devices,
    rendezvous_port,
    torchrun_command,
)
from sharding.ranks.errors import UserError
from tests.support import ROOT

ARGUMENTS = ["configs/x.yaml", "steps=20", "optimizer.lr=1e-3"]
ON_A_CPU = ["-1", "-1"]


def world_of(argv: list[str]) -> str:
    (option,) = [argument for argument in argv if argument.startswith("--world_info=")]
    return base64.urlsafe_b64decode(option.removeprefix("--world_info=")).decode()


def test_argv_of_torchrun() -> None:
    assert torchrun_command(ARGUMENTS, 29500, ["0", "1", "2", "3"]) == [
        sys.executable,
        "-m",
        "sharding.ranks.loopback",
        "torch.distributed.run",
        "--nnodes=1",
        "--nproc-per-node=4",
        "--master-addr=127.0.0.1",
        "--master-port=29500",
        "--max-restarts=0",
        "-m",
        "trainer",
        *ARGUMENTS,
    ]


def test_argv_of_deepspeed() -> None:
    argv = deepspeed_command(ARGUMENTS, 29500, ON_A_CPU)
    assert argv == [
        sys.executable,
        "-m",
        "deepspeed.launcher.launch",
        "--world_info=eyJsb2NhbGhvc3QiOiBbIi0xIiwgIi0xIl19",
        "--master_addr=127.0.0.1",
        "--master_port=29500",
        "--log_level=critical",
        "--module",
        "trainer",
        *ARGUMENTS,
    ]
    assert world_of(argv) == '{"localhost": ["-1", "-1"]}'
    assert world_of(deepspeed_command(ARGUMENTS, 0, ["2", "GPU-8a3c"])) == '{"localhost": ["2", "GPU-8a3c"]}'


@pytest.mark.parametrize(("devices", "several"), [(ON_A_CPU, ["--multi_gpu"]), (["0"], [])])
def test_argv_of_accelerate(devices: list[str], several: list[str]) -> None:
    assert accelerate_command(ARGUMENTS, 29500, devices) == [
        sys.executable,
        "-m",
        "sharding.ranks.loopback",
        "accelerate.commands.launch",
        f"--config_file={ROOT / 'launcher' / 'accelerate_defaults.yaml'}",
        f"--num_processes={len(devices)}",
        *several,
        "--main_process_port=29500",
        "--quiet",
        "--module",
        "trainer",
        *ARGUMENTS,
    ]


@pytest.mark.parametrize(
    ("num_ranks", "has_gpu", "visible", "devices"),
    [
        (2, False, None, ["-1", "-1"]),
        # GPUs that were hidden to compute on the CPU stay hidden.
        (2, False, "", ["-1", "-1"]),
        (2, True, None, ["0", "1"]),
        (2, True, "3, 1,0", ["3", "1"]),
        (1, True, "GPU-8a3c,GPU-77aa", ["GPU-8a3c"]),
    ],
)
def test_each_rank_gets_a_gpu_that_the_user_left_visible(
    num_ranks: int, has_gpu: bool, visible: str | None, devices: list[str]
) -> None:
    environment = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    assert rank_devices(num_ranks, has_gpu, environment) == devices


def test_a_launcher_that_is_not_known() -> None:
    with pytest.raises(UserError) as refused:
        find_launcher("mpirun")
    assert str(refused.value) == "--launcher mpirun is not known; choose one of torchrun, deepspeed, accelerate."


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
