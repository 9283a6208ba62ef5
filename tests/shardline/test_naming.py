"""Parts of one's own by a name under which they are found again, and configurations from Python's values."""

import functools
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import shardline
from shardline import RunConfig, UserError, load_config
from tests.shardline.own_parts import Network, Points, settings
from tests.support import ROOT, command_environment
from trainer.runtime.own_modules import import_own, name_own


class Holder:
    class Inside(Network):
        pass


def test_a_class_is_named_by_its_module_and_found_again() -> None:
    name, folder = name_own(Network, "model")
    assert name == "tests.shardline.own_parts:Network"
    assert import_own(name, "model.factory", folder) is Network
    # Shardline's own are found without a folder, as are those that are installed.
    assert name_own(shardline.Task, "task") == ("trainer.tasks.task:Task", None)
    assert name_own(subprocess.Popen, "samples") == ("subprocess:Popen", None)
    assert name_own(pytest.Item, "samples")[1] is None


@pytest.mark.parametrize(
    ("thing", "reason"),
    [
        (Points(), "is an object, and how it was made could not be written"),
        (functools.partial(Points, 12), "is an object"),
        (lambda: None, "is not found as .*lambda.* of tests.shardline.test_naming"),
        (Holder.Inside, "is not found as Holder.Inside of"),
        (functools.wraps(Points)(lambda: Points()), "is not found as Points of"),
    ],
    ids=["object", "partial", "lambda", "nested", "wrapped"],
)
def test_what_nothing_could_find_again_is_refused(tmp_path: Path, thing: Any, reason: str) -> None:
    with pytest.raises(UserError, match=f"^samples=.*{reason}"):
        load_config(settings(tmp_path, "x"), model=Network, samples=thing)


def test_what_was_written_at_a_prompt_is_refused() -> None:
    code = "import shardline\nclass Mine: pass\nshardline.load_config({}, task=Mine)"
    finished = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=command_environment(), check=False
    )
    assert "was written at a prompt or in a notebook" in finished.stderr.splitlines()[-1]


def test_parts_and_names_do_not_contradict_one_another(tmp_path: Path) -> None:
    given = settings(tmp_path, "x")
    with pytest.raises(UserError, match=r"^data.source=text, but tests.shardline.own_parts:Points was given"):
        load_config(settings(tmp_path, "x", data={"source": "text"}), model=Network, samples=Points)
    with pytest.raises(UserError, match=r"^task.name=classification, but .*:Network was given"):
        load_config(given, task=Network, model=Network, samples=Points)
    with pytest.raises(UserError, match=r"exactly one of model.architecture"):
        load_config(given, ["model.architecture=llama"], model=Network, samples=Points)
    config = load_config(given, model=Network, samples=Points)
    assert load_config(config) is config
    assert load_config(config, ["steps=9"]).steps == 9
    assert load_config(config, samples=Points) == config


def test_values_of_python_are_taken_as_a_file_would_have_them(tmp_path: Path) -> None:
    given = settings(tmp_path, "x", data={"arguments": {"num_train": 24}})
    given["optimizer"] = {"lr": np.float64(0.5), "betas": (0.9, 0.95)}
    config = load_config(given, model=Network, samples=Points)
    assert isinstance(config, RunConfig)
    assert (config.optimizer.lr, type(config.optimizer.lr), config.output_dir) == (0.5, float, str(tmp_path / "runs"))
    assert given["optimizer"]["betas"] == (0.9, 0.95)
    with pytest.raises(UserError, match=r"^model.arguments.kind=<class .*Points'> is a type, which no configuration"):
        load_config(settings(tmp_path, "x", model={"arguments": {"kind": Points}}), model=Network, samples=Points)
    with pytest.raises(UserError, match=r"^the configuration: unknown key optimizer.rate"):
        load_config(settings(tmp_path, "x", optimizer={"rate": 1}), model=Network, samples=Points)


def _script(file: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A script as this process's."""
    file.write_text("class Mine: pass\n")
    module = ModuleType("__main__")
    module.__file__ = str(file)
    exec(file.read_text(), module.__dict__)
    monkeypatch.setitem(sys.modules, "__main__", module)
    return module


def test_a_class_of_the_script_is_named_by_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = _script(tmp_path / "a_script_of_tests.py", monkeypatch)
    name, folder = name_own(script.Mine, "task")
    assert (name, folder) == ("a_script_of_tests:Mine", str(tmp_path))
    # The same class, not one of a second import.
    assert import_own(name, "task.name", folder) is script.Mine
    monkeypatch.delitem(sys.modules, "a_script_of_tests")
    assert import_own(name, "task.name", folder).__module__ == "a_script_of_tests"


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("json.py", "a module json is there already, from .*json/__init__.py; call the file otherwise"),
        ("a.b.py", "cannot be imported; call the file NAME.py"),
        ("script", "cannot be imported; call the file NAME.py"),
    ],
)
def test_a_script_that_others_could_not_import_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, reason: str
) -> None:
    script = _script(tmp_path / name, monkeypatch)
    with pytest.raises(UserError, match=reason):
        name_own(script.Mine, "task")


def test_a_script_that_is_imported_for_its_parts_does_not_train(tmp_path: Path) -> None:
    (tmp_path / "without_a_guard.py").write_text(
        "import pathlib, shardline\n"
        "from tests.shardline.own_parts import Network, Points, settings\n"
        f"shardline.train(settings(pathlib.Path({str(tmp_path)!r}), 'x'), model=Network, "
        "samples=Points)\n"
    )
    with pytest.raises(UserError, match=r"^train was called while its module was imported for model.factory=without_a"):
        import_own("without_a_guard:Network", "model.factory", str(tmp_path))
    assert not (tmp_path / "runs").exists()
