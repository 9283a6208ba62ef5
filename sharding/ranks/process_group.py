"""This process's place among the ranks, and the process group's lifetime."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from sharding.ranks.errors import UserError
from sharding.ranks.loopback import HOSTS, loopback_store
from sharding.ranks.rank_place import has_one_gpu_per_task, place_variables, read_ranks

# By address and port, where this process has met other ranks before. It is kept, for rank 0 may be the server, and a
# group that follows must not find the addresses of those before it: each has a prefix more.
_met_in: dict[tuple[str | None, str | None], dist.Store] = {}


@dataclass(frozen=True)
class Ranks:
    """One rank's place.

    Attributes:
        rank: number among all ranks.
        world_size: number of ranks.
        local_rank: number among the ranks of this node.
        local_world_size: number of ranks of this node.
        device: where this rank computes.
    """

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    device: torch.device


@contextmanager
def process_group(init_timeout_s: float) -> Iterator[Ranks]:
    """Join the process group: NCCL (with gloo for host tensors) where there are GPUs, gloo where there are none.

    A process may do so several times, one group after another, if all ranks do.

    Args:
        init_timeout_s: time limit of every collective until ``set_step_timeout`` lowers it.

    Raises:
        UserError: the launcher's variables make no sense, there is no GPU for this rank, or it is in a group already.
    """
    if dist.is_initialized():
        raise UserError(
            "this process is in a process group already, and it can be in one at a time: leave that by "
            "torch.distributed.destroy_process_group(), or, where a run has failed in it, start the process anew."
        )
    rank, world_size, local_rank, local_world_size = read_ranks(os.environ)
    # The rendezvous, and libraries that look for themselves, know torch's names alone.
    os.environ.update(place_variables(os.environ))
    device = _device(local_rank)
    timeout = timedelta(seconds=init_timeout_s)
    backend = "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    ranks = Ranks(rank, world_size, local_rank, local_world_size, device)
    if world_size == 1:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
        try:
            yield ranks
        except BaseException:
            # On a GPU that failed it may raise or wait, and hide why.
            if device.type == "cpu":
                dist.destroy_process_group()
            raise
        dist.destroy_process_group()
        return
    _meet(ranks, backend, timeout)
    yield ranks
    # Only on the way out of a clean run: after an error on this rank the others may be inside a collective that will
    # never complete, and tearing NCCL down can wait for them.
    dist.destroy_process_group()


def _meet(ranks: Ranks, backend: str, timeout: timedelta) -> None:
    place = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    if place in _met_in:
        again = dist.PrefixStore("again", _met_in[place])
        store: dict[str, Any] = {"store": again, "rank": ranks.rank, "world_size": ranks.world_size}
    else:
        store = _store(ranks.rank, ranks.world_size, timeout, os.environ)
    device_id = ranks.device if ranks.device.type == "cuda" else None
    dist.init_process_group(backend, timeout=timeout, device_id=device_id, **store)
    _met_in[place] = _get_default_store()


def _store(rank: int, world_size: int, timeout: timedelta, environment: Mapping[str, str]) -> dict[str, Any]:
    """Where ranks meet, where torch's own choice is not right.

    Raises:
        UserError: the port is in use.
    """
    place = {"rank": rank, "world_size": world_size}
    if environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        num_restarts = environment.get("TORCHELASTIC_RESTART_COUNT", "0")
        if num_restarts == "0":
            return {}
        # Under torchrun's static rendezvous the agent's store outlives a restart, and ranks would find the addresses
        # of those before them in it.
        store, _, _ = next(dist.rendezvous("env://", rank, world_size, timeout=timeout))
        return {"store": dist.PrefixStore(f"restart-{num_restarts}", store), **place}
    host, port = environment.get("MASTER_ADDR", ""), environment.get("MASTER_PORT", "")
    if host not in HOSTS or not port.isdigit():
        return {}
    try:
        # torch's own would listen on all interfaces.
        return {"store": loopback_store(host, int(port), world_size, rank == 0, timeout), **place}
    except OSError as error:
        raise UserError(f"MASTER_PORT={port} cannot be used ({error.strerror}); choose another.") from None


def set_step_timeout(timeout_s: float) -> None:
    """Set the time limit of collectives from here on: start-up is slow, a step is not."""
    from torch.distributed.distributed_c10d import _set_pg_timeout, _world

    for group in list(_world.pg_map):
        _set_pg_timeout(timedelta(seconds=timeout_s), group)


def _device(local_rank: int) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    num_gpus = torch.cuda.device_count()
    if num_gpus == 1 and has_one_gpu_per_task(os.environ):
        # Slurm can show each task just its own GPU, whatever the local rank.
        local_rank = 0
    if local_rank >= num_gpus:
        raise UserError(
            f"LOCAL_RANK={local_rank}, but only {num_gpus} GPUs are visible; start at most {num_gpus} ranks."
        )
    return torch.device("cuda", local_rank)
