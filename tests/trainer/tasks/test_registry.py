"""Where a task of the user's own comes from: the configuration's folder, and never the working folder."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sharding.ranks.errors import UserError
from tests.support import write_config
from trainer.config import RunConfig, config_to_yaml, load_config
from trainer.data.facts import SampleFacts
from trainer.tasks.registry import build_task

TASK = "import own_task_words\nclass Own:\n    words = own_task_words.WORDS\n"


@pytest.fixture(autouse=True)
def _imports_nothing_for_others(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(sys, "path", [folder for folder in sys.path if folder not in ("", ".")])
    yield
    for name in ("own_task", "own_task_words", "own_package", "own_package.task"):
        sys.modules.pop(name, None)


def build(config: RunConfig) -> Any:
    return build_task(config.task.name, folder=config.task.folder)


def test_a_task_beside_the_configuration(
    tmp_path: Path, config_file: Path, values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_task.py").write_text(TASK)
    (tmp_path / "own_task_words.py").write_text("WORDS = 'beside'\n")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    config = load_config(config_file, ["task.name=own_task:Own"])
    assert config.task.folder == str(tmp_path)
    # A copy of it in the run's folder still knows.
    copy = elsewhere / "config.yaml"
    copy.write_text(config_to_yaml(config))
    assert load_config(copy) == config
    assert build(load_config(copy)).words == "beside"
    # Not before what is installed.
    assert sys.path.index(str(tmp_path)) == len(sys.path) - 1


def test_a_package_beside_the_configuration(tmp_path: Path, config_file: Path) -> None:
    (tmp_path / "own_package").mkdir()
    (tmp_path / "own_package" / "task.py").write_text("class Own:\n    pass\n")
    assert type(build(load_config(config_file, ["task.name=own_package.task:Own"]))).__name__ == "Own"


def test_the_working_folder_is_no_place_for_it(
    tmp_path: Path, values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_task.py").write_text("class Own:\n    pass\n")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()
    file = write_config(tmp_path / "configs" / "own.yaml", values)
    config = load_config(file, ["task.name=own_task:Own"])
    with pytest.raises(UserError, match=r"No module named 'own_task'.*the working folder does not count") as refused:
        build(config)
    assert "no task.folder is set" in str(refused.value)
    assert build(load_config(file, ["task.name=own_task:Own", f"task.folder={tmp_path}"])) is not None


def test_one_that_is_installed(tmp_path: Path, config_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "own_task.py").write_text("class Own:\n    pass\n")
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path / "site")])
    config = load_config(config_file, ["task.name=own_task:Own"])
    assert config.task.folder is None
    assert build(config) is not None


def test_one_of_the_name_of_a_library_is_not_mixed_up(tmp_path: Path, config_file: Path) -> None:
    (tmp_path / "yaml.py").write_text("class Own:\n    pass\n")
    with pytest.raises(UserError, match=r"the module yaml is taken from .*/yaml/__init__.py, so rename yours"):
        build(load_config(config_file, ["task.name=yaml:Own"]))


_MISTAKEN = """
class Broken:
    def __init__(self):
        self.weight = self.no_such_attribute

class NeedsMore:
    def __init__(self):
        import no_such_module_of_the_users
"""


def test_a_mistake_in_a_tasks_own_code_is_not_called_a_wrong_name(tmp_path: Path) -> None:
    (tmp_path / "own_task.py").write_text(_MISTAKEN)
    folder = str(tmp_path)
    with pytest.raises(AttributeError, match="no_such_attribute"):
        build_task("own_task:Broken", folder=folder)
    with pytest.raises(ModuleNotFoundError, match="no_such_module_of_the_users"):
        build_task("own_task:NeedsMore", folder=folder)
    with pytest.raises(UserError, match=r"task.name=own_task:Other cannot .* module 'own_task' has no 'Other';"):
        build_task("own_task:Other", folder=folder)


_EARLIER = """
from trainer.tasks.causal_lm import CausalLanguageModelling

class Model(CausalLanguageModelling):
    def build_model(self, model_config):
        return None

class Loss(CausalLanguageModelling):
    def loss(self, model, batch):
        return super().loss(model, batch)

class Sums(CausalLanguageModelling):
    def evaluation_sums(self, model, batch):
        return None

class Batches(CausalLanguageModelling):
    def make_batch(self, sequences):
        return sequences
"""


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("Model", r"build_model\(model_config\)"),
        ("Loss", r"loss\(model, batch\)"),
        ("Sums", "evaluation_sums"),
        ("Batches", r"make_batch\(sequences\)"),
    ],
)
def test_a_task_of_an_earlier_release_is_refused_with_the_methods_of_today(
    tmp_path: Path, name: str, found: str
) -> None:
    (tmp_path / "own_task.py").write_text(_EARLIER)
    with pytest.raises(
        UserError, match=rf"^task.name=own_task:{name} has {found} of an earlier .* loss\(outputs, batch\).*\.$"
    ):
        build_task(f"own_task:{name}", folder=str(tmp_path))


_WITH_OPTIONS = """
from trainer.tasks.causal_lm import CausalLanguageModelling

class Both(CausalLanguageModelling):
    def __init__(self, options, facts):
        super().__init__()
        self.given = options, facts

class Facts(CausalLanguageModelling):
    def __init__(self, facts):
        super().__init__()
        self.given = facts

class Neither(CausalLanguageModelling):
    pass
"""


def test_options_and_facts_reach_a_class_that_has_arguments_for_them(tmp_path: Path) -> None:
    (tmp_path / "own_task.py").write_text(_WITH_OPTIONS)
    folder, facts = str(tmp_path), SampleFacts(16, 301, 0, tmp_path / "tokenizer")
    both: Any = build_task("own_task:Both", folder=folder, options={"rate": 0.15}, facts=facts)
    assert both.given == ({"rate": 0.15}, facts)
    without: Any = build_task("own_task:Both", folder=folder, facts=facts)
    assert without.given == ({}, facts)
    alone: Any = build_task("own_task:Facts", folder=folder, facts=facts)
    assert alone.given == facts
    build_task("own_task:Neither", folder=folder, facts=facts)
    for name in ("Facts", "Neither"):
        with pytest.raises(
            UserError, match=rf"^task.options={{'rate': 0.15}} cannot be given to own_task:{name}, .*options, facts\)"
        ):
            build_task(f"own_task:{name}", folder=folder, options={"rate": 0.15}, facts=facts)


def test_one_that_inherits_from_a_task_of_ours_gets_its_settings(tmp_path: Path) -> None:
    (tmp_path / "own_task.py").write_text(
        "from trainer.tasks.classification import Classification\n"
        "class Own(Classification):\n    def num_tokens(self, batch):\n        return 7\n"
    )
    facts = SampleFacts(num_features=3, classes=("a", "b"), class_counts=(2, 1))
    task: Any = build_task("own_task:Own", facts, folder=str(tmp_path))
    assert (task.num_outputs, task.num_tokens({})) == (2, 7)
    assert task.directions()["auroc"] == "higher"
