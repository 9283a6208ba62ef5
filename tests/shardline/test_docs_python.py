"""Every script of docs/python.md, on one rank and on two."""

import ast
import re
import subprocess
from pathlib import Path

import pytest

from sharding.ranks.local_group import free_port
from shardline import Run
from tests.support import ROOT, run_module, shardline, tiny_values, trained, write_config

pytestmark = pytest.mark.timeout(300)

PAGE = (ROOT / "docs" / "python.md").read_text()


def scripts() -> dict[str, str]:
    """The page's scripts by the names that it gives them."""
    return dict(re.findall(r"`(\w+\.py)`[^`]*\n\n```python\n(.*?)```", PAGE, re.DOTALL))


def _alone(file: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return run_module("tests.shardline.script", file, *arguments)


def _on_two_ranks(file: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    options = ("--nproc-per-node=2", f"--master-port={free_port()}", "-m", "tests.shardline.script")
    return run_module("torch.distributed.run", *options, file, *arguments)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The scripts of the page, each a file."""
    folder = tmp_path_factory.mktemp("scripts")
    assert set(scripts()) == {"spirals.py", "results.py", "text.py", "loop.py"}
    for name, code in scripts().items():
        (folder / name).write_text(code)
    return folder


def test_a_run_of_own_parts_and_what_has_become_of_it(folder: Path) -> None:
    settings = (f"data.cache_dir={folder}", "tracking.wandb.mode=disabled")
    alone = _alone(folder / "spirals.py", *settings)
    trained(alone)
    run, said = Run(folder / "runs" / "spirals"), alone.stdout
    assert re.findall(r"after step (\d+): ", said) == ["100", "200", "300"]
    assert run.metrics[-1]["eval/accuracy"] > 0.95
    assert run.config.model.factory == "spirals:Network"
    assert run.config.model.folder == str(folder)
    # On two ranks, with another override: as the page has it.
    (command,) = re.findall(r"^torchrun --nproc-per-node 2 spirals.py (.*)$", PAGE, re.MULTILINE)
    trained(_on_two_ranks(folder / "spirals.py", *settings, *command.split(), "steps=20"))
    slower = Run(folder / "runs" / "slower")
    assert (slower.config.optimizer.lr, slower.metrics[-1]["step"]) == (3e-3, 20)
    read = _alone(folder / "results.py")
    trained(read)
    lines = read.stdout.splitlines()
    assert re.fullmatch(r"finished 0\.01 \[[\d, ]*300\]", lines[0])
    assert [step for step, _ in ast.literal_eval(lines[1])] == [100, 200, 300]
    assert float(lines[2].partition("%")[0]) > 95
    assert lines[3] == "runs/spirals/report.html"
    # Whoever continues it from its own configuration imports the script, which does not train by that.
    config = folder / "runs" / "spirals" / "config.yaml"
    longer = shardline("run", config, "steps=310", f"output_dir={folder / 'runs'}", "--nproc-per-node=1")
    trained(longer)
    assert Run(folder / "runs" / "spirals").metrics[-1]["step"] == 310
    # The page says forty lines: of code that says something.
    code = scripts()["spirals.py"].splitlines()
    assert len([line for line in code if line and not line.startswith(("import", "from"))]) <= 50


def test_a_loop_on_sharding_trains_alike_on_any_number_of_ranks(folder: Path) -> None:
    losses = []
    for start in (_alone, _on_two_ranks):
        finished = start(folder / "loop.py")
        trained(finished)
        found = re.findall(r"^step (\d+) loss (\S+)$", finished.stdout, re.MULTILINE)
        assert [step for step, _ in found] == ["100", "200", "300"]
        losses.append([float(loss) for _, loss in found])
    assert max(losses[0][-1], losses[1][-1]) < 0.25
    code = scripts()["loop.py"]
    loop = code[code.index("with process_group") :]
    assert len([line for line in loop.splitlines() if line]) <= 24


def test_a_language_model_writes_and_is_exported(folder: Path, shared_corpus: tuple[Path, Path]) -> None:
    corpus, cache = shared_corpus
    values = tiny_values(folder / "runs", cache, corpus) | {"name": "quickstart", "steps": 2}
    trained(shardline("run", write_config(folder / "quickstart.yaml", values), "--nproc-per-node=1"))
    finished = _alone(folder / "text.py")
    trained(finished)
    assert finished.stdout.startswith("import ")
    assert re.search(r"^[\d,]+ parameters, 30\d tokens$", finished.stdout, re.MULTILINE)
    made = re.findall(r"^(def|class)  (\d) (['\"]).+\3$", finished.stdout, re.MULTILINE)
    assert [(prompt, seed) for prompt, seed, _ in made] == [(p, s) for p in ("def", "class") for s in "012"]
    assert (folder / "exported" / "model.safetensors").exists()
    # What it has not learnt, and what it has none of.
    asks = folder / "asks.py"
    for call, said in (
        ("generate('x', chat=True)", "--chat: the tokenizer has no chat template"),
        ("export('adapters', form='adapter')", "adapter"),
        ("evaluate('test')", "--split test: runs/quickstart has no samples in such a split"),
    ):
        asks.write_text(f"from shardline import Run\nRun('runs/quickstart').{call}\n")
        refused = _alone(asks)
        assert refused.returncode == 1
        assert said in refused.stderr.splitlines()[-1], refused.stderr
