"""The cluster, and runs on it."""

import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.slurm.cluster import Cluster, why_no_cluster
from tests.support import shardline, tiny_values, write_config


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """A real Slurm of two nodes; skips where there can be none, and says why."""
    if reason := why_no_cluster():
        pytest.skip(f"no Slurm: {reason}")
    # The name of a socket in it may have 107 characters, which a folder of pytest's may exceed.
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    running = Cluster(folder)
    running.start()
    try:
        yield running
    finally:
        running.stop()
        shutil.rmtree(folder)


@pytest.fixture(scope="session")
def slurm_config(tmp_path_factory: pytest.TempPathFactory, shared_corpus: tuple[Path, Path]) -> Callable[..., Path]:
    """Write the configuration of a tiny run, whose corpus is prepared; its folder is ``runs/NAME`` beside the file."""
    corpus, cache = shared_corpus
    root = tmp_path_factory.mktemp("jobs")
    # Equal on all nodes and under all launchers, for equal sums.
    base = tiny_values(root / "runs", cache, corpus) | {"launch": {"threads_per_rank": 1}}

    def make(name: str, **sections: Any) -> Path:
        return write_config(root / f"{name}.yaml", base | {"name": name} | sections)

    prepared = shardline("data", "prepare", make("corpus"))
    assert prepared.returncode == 0, prepared.stderr
    return make
