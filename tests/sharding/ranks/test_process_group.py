"""A rank's place among the others, and the process group."""

import os
import time

import pytest
import torch
import torch.distributed as dist

from sharding.ranks import process_group as module
from sharding.ranks.errors import UserError
from sharding.ranks.process_group import Ranks, process_group, set_step_timeout
from sharding.ranks.rank_place import read_ranks
from tests.support import run_on_ranks

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


def variables(*values: object) -> dict[str, str]:
    return {name: str(value) for name, value in zip(NAMES, values, strict=True)}


def test_rank_progress() -> None:
    assert read_ranks({}) == (0, 1, 0, 1)
    assert read_ranks(variables(5, 8, 1, 4)) == (5, 8, 1, 4)
    # As DeepSpeed's launcher sets them.
    by_deepspeed = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_SIZE": "4"}
    assert read_ranks(by_deepspeed | {"CROSS_RANK": "1", "CROSS_SIZE": "2"}) == (5, 8, 1, 4)
    # As `accelerate launch` does for one process; and a LOCAL_SIZE of somebody else's.
    assert read_ranks({"ACCELERATE_DYNAMO_BACKEND": "NO"}) == (0, 1, 0, 1)
    assert read_ranks({"LOCAL_SIZE": "4"}) == (0, 1, 0, 1)


@pytest.mark.parametrize(
    ("environment", "sentence"),
    [
        ({"RANK": "1", "WORLD_SIZE": "2"}, "RANK=1, WORLD_SIZE=2 is set, but LOCAL_RANK, LOCAL_WORLD_SIZE is not"),
        (variables(2, 2, 0, 2), "RANK=2 does not fit WORLD_SIZE=2"),
        (variables(-1, 2, 0, 2), "RANK=-1 does not fit WORLD_SIZE=2"),
        (variables(0, 2, 2, 2), "LOCAL_RANK=2 does not fit LOCAL_WORLD_SIZE=2"),
        (variables(0, 2, 0, 4), "LOCAL_WORLD_SIZE=4 does not fit WORLD_SIZE=2"),
        ({"RANK": "1", "LOCAL_SIZE": "2"}, "RANK=1, LOCAL_WORLD_SIZE=2 is set, but WORLD_SIZE, LOCAL_RANK is not"),
        (variables(0, 2, 0, 2) | {"LOCAL_SIZE": "1"}, "LOCAL_WORLD_SIZE=2 does not fit LOCAL_SIZE=1; one launcher"),
        (
            {"ACCELERATE_DYNAMO_BACKEND": "NO", "MASTER_ADDR": "127.0.0.1"},
            "accelerate launch was asked for several processes and started one, as it does on a CPU; add --multi_gpu",
        ),
        (variables("first", 2, 0, 2), "RANK=first, WORLD_SIZE=2, LOCAL_RANK=0, LOCAL_WORLD_SIZE=2: not all"),
    ],
)
def test_variables_that_make_no_sense_are_named(environment: dict[str, str], sentence: str) -> None:
    with pytest.raises(UserError) as refused:
        read_ranks(environment)
    assert str(refused.value).startswith(sentence)


@pytest.mark.parametrize(
    ("local_rank", "num_gpus", "environment", "expected"),
    [
        (1, 2, {}, 1),
        # One GPU shown to each task.
        (1, 1, {"SLURM_PROCID": "1"}, 0),
        (1, 1, {"SLURM_PROCID": "0", "TORCHELASTIC_RUN_ID": "x"}, None),
        (1, 1, {"SLURM_PROCID": "0", "LOCAL_SIZE": "2"}, None),
        (1, 1, {}, None),
        (2, 2, {"SLURM_PROCID": "2"}, None),
    ],
)
def test_the_gpu_of_a_rank(
    monkeypatch: pytest.MonkeyPatch,
    local_rank: int,
    num_gpus: int,
    environment: dict[str, str],
    expected: int | None,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_gpus)
    for name in ("SLURM_PROCID", "TORCHELASTIC_RUN_ID", "LOCAL_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    if expected is None:
        with pytest.raises(UserError, match=rf"LOCAL_RANK={local_rank}, but only {num_gpus} GPUs are visible"):
            module._device(local_rank)
    else:
        assert module._device(local_rank) == torch.device("cuda", expected)


@pytest.mark.skipif(torch.cuda.is_available(), reason="for a machine without GPUs")
def test_one_rank_needs_no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*NAMES, "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with process_group(60.0) as ranks:
        assert ranks == Ranks(0, 1, 0, 1, torch.device("cpu"))
        value = torch.ones(1)
        dist.all_reduce(value)
        assert value.item() == 1.0
    assert not dist.is_initialized()


def _fail_in_a_group(ranks: Ranks) -> None:
    dist.destroy_process_group()
    with pytest.raises(ValueError, match="mine"), process_group(60.0):
        raise ValueError("mine")
    # Left as it is, for os._exit.
    assert dist.is_initialized()
    os._exit(0)


def test_a_failing_rank_starts_no_collective_on_its_way_out() -> None:
    run_on_ranks(_fail_in_a_group, 2)


@pytest.mark.skipif(torch.cuda.is_available(), reason="for a machine without GPUs")
def test_a_rank_alone_leaves_its_group_also_where_it_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    for _ in range(2):
        with pytest.raises(ValueError, match="mine"), process_group(60.0):
            raise ValueError("mine")
        assert not dist.is_initialized()


def _wait_for_a_rank_that_never_comes(ranks: Ranks) -> None:
    group = dist.new_group([0, 1])
    # Both have left the creation of the group, which is a collective of its own.
    dist.barrier()
    set_step_timeout(1.0)
    if ranks.rank == 1:
        # Its end would close the connection, which is another error.
        time.sleep(8)
        os._exit(0)
    for tried in (None, group):
        started_at = time.monotonic()
        with pytest.raises(RuntimeError, match=r"(?i)timed? ?out"):
            dist.all_reduce(torch.ones(1), group=tried)
        assert time.monotonic() - started_at < 5
    os._exit(0)


@pytest.mark.timing
@pytest.mark.timeout(120)
def test_the_step_timeout_holds_for_every_group() -> None:
    run_on_ranks(_wait_for_a_rank_that_never_comes, 2)
