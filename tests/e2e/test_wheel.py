"""The wheel that users install: built, installed into an environment of its own, and trained with elsewhere."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest

from sharding.ranks.local_group import free_port
from tests.shardline.test_docs_python import scripts
from tests.support import ROOT, read_metrics, tiny_values, write_config


def _run(*command: object, cwd: Path, **extra: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    finished = subprocess.run(
        [*map(str, command)], cwd=cwd, env=environment | extra, capture_output=True, text=True, timeout=250, check=False
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return finished.stdout


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment in which the wheel is installed, and no checkout."""
    tmp_path = tmp_path_factory.mktemp("wheel")
    # From a copy, for setuptools builds in the folder itself.
    source = tmp_path / "source"
    for name in ("benchmarks", "configs", "launcher", "sharding", "shardline", "slurm", "tests", "trainer"):
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
    where = "import launcher, trainer, sharding; print(launcher.__file__, trainer.__file__, sharding.__file__)"
    assert all(str(site) in path for path in _run(fresh / "bin" / "python", "-c", where, cwd=tmp_path).split())
    return fresh / "bin" / "python"


_COMMAND = "from launcher.cli import main; main()"


@pytest.mark.timeout(600)
def test_the_wheel_trains_outside_of_the_repository(
    python: Path, tmp_path: Path, shared_corpus: tuple[Path, Path]
) -> None:
    corpus, cache = shared_corpus
    config = write_config(tmp_path / "run.yaml", tiny_values(tmp_path / "runs", cache, corpus))
    printed = _run(python, "-c", _COMMAND, "run", config, "steps=3", cwd=tmp_path)
    assert "all steps done" in printed or "finished" in printed, printed
    assert [line["step"] for line in read_metrics(tmp_path / "runs" / "tiny")] == [1, 2, 3]


@pytest.mark.timeout(600)
def test_the_example_of_an_own_task_runs_as_it_is_written(python: Path, tmp_path: Path) -> None:
    page = (ROOT / "docs" / "own-task.md").read_text()
    code, configuration, commands = re.findall(r"```(?:python|yaml|sh)\n(.*?)```", page, re.DOTALL)
    (tmp_path / "chords.py").write_text(code)
    (tmp_path / "chords.yaml").write_text(configuration)
    run, evaluate = (line.split()[1:] for line in commands.splitlines())
    _run(python, "-c", _COMMAND, *run, "tracking.wandb.mode=disabled", f"data.cache_dir={tmp_path}", cwd=tmp_path)
    logged = read_metrics(tmp_path / "runs" / "chords")
    assert logged[-1]["train/loss"] < 0.5 * logged[0]["train/loss"]
    printed = json.loads(_run(python, "-c", _COMMAND, *evaluate, "--json", cwd=tmp_path))
    assert printed["samples"] == 200
    assert printed["metrics"]["accuracy"] > 0.9
    # Half an hour's reading is 40 lines, of code that says something.
    assert len([line for line in code.splitlines() if line and not line.startswith(("import", "from", "#"))]) <= 45


@pytest.mark.timeout(600)
def test_a_script_trains_though_modules_beside_it_are_called_like_ours(python: Path, tmp_path: Path) -> None:
    script = tmp_path / "spirals.py"
    script.write_text(scripts()["spirals.py"])
    for name in ("launcher", "sharding", "trainer"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('the one beside the script')")
    options = ("--nproc-per-node", 2, f"--master-port={free_port()}")
    settings = ("steps=100", f"data.cache_dir={tmp_path}", "tracking.wandb.mode=disabled")
    # As torchrun does it, whose own script the environment lacks.
    printed = _run(python, "-P", "-m", "torch.distributed.run", *options, script, *settings, cwd=tmp_path)
    assert "after step 100: " in printed
    assert [line["step"] for line in read_metrics(tmp_path / "runs" / "spirals")][-1] == 100
