"""Fixtures for all tests."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

# Before torch is imported anywhere: all tests but those of tests/e2e/test_gpus.py run on the CPU, over gloo, on every
# machine.
os.environ.setdefault("SHARDLINE_TESTS_GPUS", os.environ.get("CUDA_VISIBLE_DEVICES", "all"))
os.environ["CUDA_VISIBLE_DEVICES"] = ""
# Groups of tests share the cores: a thread that waits for another by spinning takes one from it.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["OMP_WAIT_POLICY"] = "passive"
# scikit-learn sets them where it is imported, after which no clone of the zygote would be like this process.
os.environ["KMP_DUPLICATE_LIB_OK"] = "True"
os.environ["KMP_INIT_AT_FORK"] = "FALSE"
# A process under test reads what another has compiled: compiling all files of ours takes each 0.4 s.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

from hypothesis import HealthCheck, settings

from tests.support import tiny_values, write_config, write_corpus

# Groups of tests share the cores, so no time limit says anything of a property. The suite tries the same examples each
# time: a change is judged by what it changes, and `make soak` looks for new ones.
settings.register_profile("suite", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("search", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("suite")


@pytest.fixture(scope="session")
def shared_corpus(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A small corpus and a cache folder for what is prepared from it, the same for all tests."""
    root = tmp_path_factory.mktemp("corpus")
    return write_corpus(root / "documents"), root / "cache"


@pytest.fixture
def values(tmp_path: Path, shared_corpus: tuple[Path, Path]) -> dict[str, Any]:
    """Settings of a tiny run in a folder of its own."""
    corpus, cache = shared_corpus
    return tiny_values(tmp_path / "runs", cache, corpus)


@pytest.fixture
def config_file(tmp_path: Path, values: dict[str, Any]) -> Path:
    """The tiny run's configuration file."""
    return write_config(tmp_path / "tiny.yaml", values)


@pytest.fixture
def make_config(tmp_path: Path, values: dict[str, Any]) -> Callable[..., Path]:
    """Write the tiny run's configuration with other sections; returns the file."""

    def make(name: str = "tiny", replace_model: dict[str, Any] | None = None, **sections: Any) -> Path:
        merged = values | {"name": name, "model": replace_model or values["model"]}
        for key, value in sections.items():
            merged[key] = {**merged[key], **value} if isinstance(merged.get(key), dict) else value
        return write_config(tmp_path / f"{name}.yaml", merged)

    return make
