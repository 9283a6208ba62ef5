"""The wheel that users install: built, installed into an environment of its own, and trained with elsewhere."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest

from tests.support import ROOT, read_metrics, tiny_values, write_config


def _run(*command: object, cwd: Path, **extra: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    finished = subprocess.run(
        [*map(str, command)], cwd=cwd, env=environment | extra, capture_output=True, text=True, timeout=250, check=False
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return finished.stdout


@pytest.mark.timeout(600)
def test_the_wheel_trains_outside_of_the_repository(tmp_path: Path, shared_corpus: tuple[Path, Path]) -> None:
    # From a copy, for setuptools builds in the folder itself.
    source = tmp_path / "source"
    for name in ("benchmarks", "configs", "launcher", "sharding", "slurm", "tests", "trainer"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("LICENSE", "README.md", "pyproject.toml"):
        shutil.copy(ROOT / name, source)
    build = "import setuptools.build_meta as backend, sys; print(backend.build_wheel(sys.argv[1]))"
    name = _run(sys.executable, "-c", build, tmp_path, cwd=source).splitlines()[-1]
    packed = set(ZipFile(tmp_path / name).namelist())
    assert {"configs/quickstart.yaml", "slurm/pretrain.sbatch", "trainer/report/page.html"} <= packed
    assert not [entry for entry in packed if entry.startswith(("tests/", "benchmarks/results/"))]

    fresh = tmp_path / "fresh"
    _run(sys.executable, "-m", "venv", "--without-pip", fresh, cwd=tmp_path)
    (site,) = (fresh / "lib").glob("python*/site-packages")
    ZipFile(tmp_path / name).extractall(site)
    # What Shardline needs is taken from here, for a test fetches nothing. A folder that is appended is not asked for
    # links to other folders, such as the one to this checkout.
    installed = [folder for folder in sys.path if folder.endswith(("site-packages", "dist-packages"))]
    (site / "needs.pth").write_text(f"import sys; sys.path.extend({installed!r})\n")
    python = fresh / "bin" / "python"

    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    where = "import launcher, trainer, sharding; print(launcher.__file__, trainer.__file__, sharding.__file__)"
    assert all(str(site) in path for path in _run(python, "-c", where, cwd=elsewhere).split())
    corpus, cache = shared_corpus
    config = write_config(elsewhere / "run.yaml", tiny_values(elsewhere / "runs", cache, corpus))
    run = "from launcher.cli import main; main()"
    printed = _run(python, "-c", run, "run", config, "steps=3", cwd=elsewhere)
    assert "all steps done" in printed or "finished" in printed, printed
    assert [line["step"] for line in read_metrics(elsewhere / "runs" / "tiny")] == [1, 2, 3]
