"""The command line that starts the ranks of this machine, under each launcher and in this interpreter."""

import base64
import json
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from sharding.ranks.errors import UserError

_HOST = "127.0.0.1"
_MODULE = "trainer"
# Runs the module that follows with a rendezvous that listens on that interface alone.
_ON_LOOPBACK = ("-m", "sharding.ranks.loopback")
_ACCELERATE_DEFAULTS = Path(__file__).with_name("accelerate_defaults.yaml")
_NO_DEVICE = "-1"


@dataclass(frozen=True)
class Place:
    """A node among the nodes of a run.

    Attributes:
        num_nodes: how many there are, each with as many ranks.
        node_rank: this one's number.
        host: name or address of the first, where the rendezvous is.
    """

    num_nodes: int = 1
    node_rank: int = 0
    host: str = _HOST


_ONE_NODE = Place()


def torchrun_command(
    arguments: Sequence[str], port: int, devices: Sequence[str], place: Place = _ONE_NODE, module: str = _MODULE
) -> list[str]:
    """Ranks of one node under torch's elastic launcher.

    Args:
        arguments: the configuration file and ``key=value`` arguments.
        port: TCP port of the rendezvous; of a single node on the loopback interface alone.
        devices: one entry a rank, see ``rank_devices``; ranks choose among the visible GPUs by themselves.
        place: this node among the others.
        module: what a rank runs.
    """
    # A node rank of our own, since the order in which nodes arrive would change the ranks, and so the order of sums.
    node = [f"--node-rank={place.node_rank}"] if place.num_nodes > 1 else []
    return [
        sys.executable,
        *_ON_LOOPBACK,
        "torch.distributed.run",
        f"--nnodes={place.num_nodes}",
        *node,
        f"--nproc-per-node={len(devices)}",
        f"--master-addr={place.host}",
        f"--master-port={port}",
        "--max-restarts=0",
        "-m",
        module,
        *arguments,
    ]


def deepspeed_command(
    arguments: Sequence[str], port: int, devices: Sequence[str], place: Place = _ONE_NODE
) -> list[str]:
    """Ranks under DeepSpeed's launcher of one node, which the ``deepspeed`` command starts on every node.

    That command is left out: it reads a site's host file, drops CUDA_VISIBLE_DEVICES, leaves its launcher and ranks
    running when it is killed, and exits with 0 when a signal killed its launcher.

    Args:
        arguments: the configuration file and ``key=value`` arguments.
        port: TCP port of the rendezvous; of a single node on the loopback interface alone.
        devices: one entry a rank, see ``rank_devices``; they become the ranks' CUDA_VISIBLE_DEVICES.
        place: this node among the others.
    """
    # Names that nobody resolves: the launcher takes its own by its number.
    names = ["localhost"] if place.num_nodes == 1 else [f"node-{index}" for index in range(place.num_nodes)]
    world = base64.urlsafe_b64encode(json.dumps({name: list(devices) for name in names}).encode()).decode()
    node = [f"--node_rank={place.node_rank}"] if place.num_nodes > 1 else []
    return [
        sys.executable,
        "-m",
        "deepspeed.launcher.launch",
        f"--world_info={world}",
        *node,
        f"--master_addr={place.host}",
        f"--master_port={port}",
        # Its log goes to standard output, between the lines of rank 0's console.
        "--log_level=critical",
        "--module",
        _MODULE,
        *arguments,
    ]


def accelerate_command(arguments: Sequence[str], port: int, devices: Sequence[str]) -> list[str]:
    """Ranks under ``accelerate launch``, which is torch's elastic launcher for several and a plain child for one.

    Args:
        arguments: the configuration file and ``key=value`` arguments.
        port: TCP port of the rendezvous, on the loopback interface alone.
        devices: one entry a rank, see ``rank_devices``; ranks choose among the visible GPUs by themselves.
    """
    return [
        sys.executable,
        *_ON_LOOPBACK,
        "accelerate.commands.launch",
        f"--config_file={_ACCELERATE_DEFAULTS}",
        f"--num_processes={len(devices)}",
        # Without it a machine without GPUs gets one process, whatever the number; with it one process is refused.
        *(["--multi_gpu"] if len(devices) > 1 else []),
        f"--main_process_port={port}",
        # For one process: its traceback alone, without the launcher's own.
        "--quiet",
        "--module",
        _MODULE,
        *arguments,
    ]


Command = Callable[[Sequence[str], int, Sequence[str]], list[str]]
# Each launcher's argv and the package that it is part of.
_LAUNCHERS: dict[str, tuple[Command, str]] = {
    "torchrun": (torchrun_command, "torch"),
    "deepspeed": (deepspeed_command, "deepspeed"),
    "accelerate": (accelerate_command, "accelerate"),
}


def find_launcher(name: str) -> Command:
    """What makes a launcher's argv.

    Raises:
        UserError: there is no such launcher, or its package is not installed.
    """
    if name not in _LAUNCHERS:
        raise UserError(f"--launcher {name} is not known; choose one of {', '.join(_LAUNCHERS)}.")
    command, package = _LAUNCHERS[name]
    if find_spec(package) is None:
        raise UserError(
            f"--launcher {name} needs the package {package}, which is not installed; "
            f"run pip install {package}, or choose another launcher."
        )
    return command


def rank_devices(num_ranks: int, has_gpu: bool, environment: Mapping[str, str]) -> list[str]:
    """The GPU of each rank as CUDA_VISIBLE_DEVICES would name it; -1, which names none, on a CPU.

    Args:
        num_ranks: ranks on this machine, at most as many as there are visible GPUs.
        has_gpu: whether ranks compute on GPUs.
        environment: CUDA_VISIBLE_DEVICES is read here.
    """
    if not has_gpu:
        return [_NO_DEVICE] * num_ranks
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    names = [str(index) for index in range(num_ranks)] if visible is None else visible.split(",")
    return [name.strip() for name in names[:num_ranks]]


def rendezvous_port(configured: int) -> int:
    """The configured port if nobody listens there, or a free one for 0.

    Raises:
        UserError: the configured port is in use.
    """
    with socket.socket() as probe:
        # Ports of connections that closed a moment ago may be used again, as the rendezvous itself does.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((_HOST, configured))
        except OSError as error:
            raise UserError(
                f"launch.master_port={configured} cannot be used ({error.strerror}); "
                "choose another, or 0 for a free one."
            ) from None
        return probe.getsockname()[1]
