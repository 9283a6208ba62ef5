"""Ranks that are done wait for the last work of rank 0: not for ever, and not for one that is gone."""

import os
import time
from pathlib import Path

import pytest

from sharding.ranks.process_group import Ranks
from tests.support import run_on_ranks, wait_until
from trainer.runtime import drain
from trainer.runtime.drain import Drain


def _finish(ranks: Ranks, folder: Path) -> None:
    began_at = time.monotonic()
    if ranks.rank != 0:
        Drain(ranks).finish(within_s=0.5)
        assert time.monotonic() - began_at >= 0.5
        (folder / f"rank-{ranks.rank}-went-on").touch()

    work = Drain(ranks)
    if ranks.rank == 0:
        # Not done before the others have given up once, however long that takes them.
        wait_until(lambda: len(list(folder.glob("rank-*-went-on"))) == 2, timeout_s=60, what="an end of the wait")
        time.sleep(1.0)
        (folder / "sent").touch()
    work.finish()
    assert (folder / "sent").exists()

    drain._KEY = "another run's"
    work = Drain(ranks)
    began_at = time.monotonic()
    if ranks.rank == 0:
        os._exit(0)
    work.finish()
    assert time.monotonic() - began_at < 30


@pytest.mark.timing
@pytest.mark.timeout(120)
def test_others_wait_for_the_last_work_of_rank_0(tmp_path: Path) -> None:
    run_on_ranks(_finish, 3, tmp_path)


@pytest.mark.timing
def test_one_rank_has_nobody_to_wait_for() -> None:
    Drain(Ranks(0, 1, 0, 1, device=None)).finish()  # type: ignore[arg-type]
