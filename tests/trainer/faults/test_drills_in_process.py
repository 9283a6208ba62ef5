"""What ``make soak`` drills through the command, in one process group: a slow rank, corrupt checkpoints and data.

Each ends bit for bit as the run that nothing befell. Of the other drills, test_bad_numbers.py has bad numbers,
tests/e2e/test_interruptions.py and tests/launcher/test_local.py the requests to stop, tests/e2e/test_tracking.py the
tracker that is away.
"""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from sharding.ranks.errors import UserError
from sharding.ranks.process_group import Ranks
from tests.runs_in_process import RunsInProcess, computed_lines, saved_state
from tests.support import run_on_ranks
from trainer.faults.injection.inject import Fault
from trainer.run_folder.events import read_events
from trainer.run_folder.folder import RunFolder

_STEPS = 6
# Long beside a step, on a busy machine too.
_SLOWER_S = 1.5


def _flip_a_bit(file: Path) -> None:
    contents = bytearray(file.read_bytes())
    contents[len(contents) * 2 // 3] ^= 1
    file.write_bytes(contents)


def _cut_in_half(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def _assert_undisturbed(found: RunFolder, undisturbed: RunFolder) -> None:
    (state, tensors), (expected_state, expected) = saved_state(found, _STEPS), saved_state(undisturbed, _STEPS)
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], tensor) for name, tensor in expected.items()), found.path.name
    assert state == expected_state
    assert computed_lines(found) == computed_lines(undisturbed)


def _check_slow(runs: RunsInProcess, undisturbed: RunFolder) -> None:
    slow = Fault(fault="slow", rank=1, step=2, num_steps=_STEPS, seconds=_SLOWER_S)
    folder = runs.train("slow", [slow], steps=_STEPS)
    _assert_undisturbed(folder, undisturbed)
    if runs.ranks.rank == 0:
        named = [event for event in read_events(folder.path) if event["kind"] == "straggler"]
        assert {event["rank"] for event in named} == {1}
        # After three log intervals.
        assert named[0]["step"] >= 4


def _check_corrupt_checkpoint(runs: RunsInProcess, undisturbed: RunFolder, corrupt: Callable[[Path], None]) -> None:
    name = corrupt.__name__.strip("_")
    folder = runs.train(name, steps=_STEPS)
    if runs.ranks.rank == 0:
        corrupt(max(folder.checkpoint_path(_STEPS).glob("*.safetensors"), key=lambda file: file.stat().st_size))
    dist.barrier()
    _assert_undisturbed(runs.train(name, steps=_STEPS), undisturbed)
    if runs.ranks.rank == 0:
        (moved,) = (event for event in read_events(folder.path) if event["kind"] == "checkpoint_damaged")
        assert moved["step"] == _STEPS
        assert Path(moved["path"]).is_dir()
        # It went on from the one before.
        discarded = (folder.path / "metrics.discarded.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in discarded] == [4, 5, 6]


def _check_corrupt_data(runs: RunsInProcess, undisturbed: RunFolder) -> None:
    cache = runs.root / "corrupt-cache"
    if runs.ranks.rank == 0:
        shutil.copytree(runs.root / "cache", cache)
    dist.barrier()
    data = {"cache_dir": str(cache)}
    folder = runs.train("data", steps=_STEPS, stop_at=4, data=data)
    shards = sorted(cache.rglob("train-*.bin"))
    assert shards
    contents = [shard.read_bytes() for shard in shards]
    dist.barrier()
    if runs.ranks.rank == 0:
        for shard, content in zip(shards, contents, strict=True):
            corrupt = bytearray(content)
            # In each block, so that no rank is left that would wait for one which has found it out.
            corrupt[::97] = bytes(byte ^ 1 for byte in content[::97])
            shard.write_bytes(corrupt)
    dist.barrier()
    with pytest.raises(UserError, match=r"train-\d+\.bin"):
        runs.train("data", steps=_STEPS, data=data)
    dist.barrier()
    assert [line["step"] for line in computed_lines(folder)] == [1, 2, 3]
    if runs.ranks.rank == 0:
        for shard, content in zip(shards, contents, strict=True):
            shard.write_bytes(content)
    dist.barrier()
    _assert_undisturbed(runs.train("data", steps=_STEPS, data=data), undisturbed)


def _drill(ranks: Ranks, root: Path, corpus: Path) -> None:
    runs = RunsInProcess(ranks, root, corpus)
    undisturbed = runs.train("undisturbed", steps=_STEPS)
    _check_slow(runs, undisturbed)
    _check_corrupt_checkpoint(runs, undisturbed, _flip_a_bit)
    _check_corrupt_checkpoint(runs, undisturbed, _cut_in_half)
    _check_corrupt_data(runs, undisturbed)


@pytest.mark.timing
def test_each_is_found_and_ends_as_the_undisturbed_run(tmp_path: Path, shared_corpus: tuple[Path, Path]) -> None:
    run_on_ranks(_drill, 2, tmp_path, shared_corpus[0])
