"""Copies of parameters on several ranks, and the one bit in which they may differ."""

import socket
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sharding.ranks.errors import RunFailure
from sharding.ranks.process_group import Ranks
from sharding.replicas import content_hashes
from tests.sharding.engine_cases import tiny_engine, train_steps
from tests.support import run_on_ranks
from trainer.numerics.replica_check import ReplicaCheck

_TENSORS = {
    dtype: torch.randn(300_000, generator=torch.Generator().manual_seed(0)).to(dtype)
    for dtype in (torch.float64, torch.float32, torch.bfloat16)
}


@given(
    dtype=st.sampled_from(list(_TENSORS)),
    place=st.one_of(st.integers(0, 299_999), st.integers(262_140, 262_148)),
    bit=st.integers(0, 15),
)
@settings(max_examples=15)
def test_any_bit_changes_the_hash(dtype: torch.dtype, place: int, bit: int) -> None:
    tensor = _TENSORS[dtype]
    before = content_hashes([tensor])
    changed = tensor.clone()
    # A view as 16-bit integers, of which an element has one to four.
    changed.view(torch.int16)[place * (tensor.element_size() // 2)] ^= (1 << bit) if bit < 15 else -(1 << 15)
    assert content_hashes([changed]) != before
    assert content_hashes([tensor.clone()]) == before


def test_a_place_counts() -> None:
    tensor = _TENSORS[torch.float32][:1000]
    swapped = tensor.clone()
    swapped[[3, 700]] = swapped[[700, 3]]
    hashes = content_hashes([tensor, swapped, tensor.view(10, 100), tensor[:0]])
    assert hashes[0] == hashes[2]
    assert hashes[0] != hashes[1]
    assert hashes[3] == 0


# Strategy, settings of parallel, and the ranks that are named when rank 2 of 4 holds something else.
_Case = tuple[str, dict[str, Any], list[int]]
_TORCH: tuple[_Case, ...] = (
    ("ddp", {}, [2]),
    ("hsdp", {"replicate": 2}, [0, 2]),
    ("hsdp", {"replicate": 2, "backend": "bucketed"}, [0, 2]),
)
_OTHERS: tuple[_Case, ...] = (
    ("ddp", {"backend": "accelerate"}, [2]),
    ("zero1", {"backend": "deepspeed"}, [2]),
    ("zero2", {"backend": "deepspeed"}, [2]),
    ("zero1", {"backend": "bucketed"}, [2]),
)


def _compare(ranks: Ranks, cases: tuple[_Case, ...]) -> None:
    for strategy, parallel, expected in cases:
        engine = tiny_engine(ranks, strategy, **parallel)
        recorded: list[tuple[int, dict[str, Any]]] = []
        check = ReplicaCheck(engine, ranks, lambda step, details, to=recorded: to.append((step, details)))
        for step in (1, 2):
            train_steps(engine, ranks, num_steps=1)
            check.run(step)
        replicas = {part.name: part.tensor for part in engine.replicas()}
        # Rows of the odd sizes that two shards divide unevenly.
        name = next(name for name in replicas if name.endswith("layers.1.mlp.down_proj.weight"))
        bits = replicas[name].view(torch.int32).view(-1)
        # Where ranks divide flat memory, some have nothing of it.
        flip = bits[-1:] if ranks.rank == 2 else bits[:0]
        flip ^= 1
        with pytest.raises(RunFailure, match=f"after step 3: .*in {name}; memory or a processor") as failure:
            check.run(3)
        assert ("no majority" in str(failure.value)) == (len(expected) == 2)
        assert f"rank 2 ({socket.gethostname()}, CPU)" in str(failure.value)
        found = [(step, details["ranks"], details["parameters"]) for step, details in recorded]
        assert found == ([(3, expected, [name])] if ranks.rank == 0 else []), (strategy, parallel)
        flip ^= 1
        check.run(4)
    for strategy in ("zero2", "zero3"):
        assert tiny_engine(ranks, strategy).replicas() == []


def test_a_bit_that_differs_on_one_rank_is_found_and_the_rank_named() -> None:
    run_on_ranks(_compare, 4, _TORCH)


@pytest.mark.slow
def test_a_bit_that_differs_is_found_under_other_backends() -> None:
    run_on_ranks(_compare, 4, _OTHERS, timeout_s=200)
