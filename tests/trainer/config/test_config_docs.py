"""The configuration as it is documented, and as it is used."""

import ast
import re
from pathlib import Path

import pytest
from pydantic import Field

from launcher.plan import make_plan
from sharding.strict_model import StrictModel
from tests.support import ROOT
from tests.trainer.config.field_reads import declaring_model, find_reads
from trainer.config import RunConfig, load_config
from trainer.config.reference import PAGE, main, render_page, section_of, sections
from trainer.plan.preview import preview

PACKAGES = ("launcher", "trainer", "sharding", "shardline", "benchmarks")
# Refused by name unless they have their one value, so a rule is all that reads them.
ONE_VALUE_ONLY = {("ParallelConfig", "expert")}
EXAMPLES = sorted((ROOT / "configs").rglob("*.yaml"))


def _leaves() -> dict[tuple[str, str], str | None]:
    """Model that declares it and field name to the sentence of every field that is a value."""
    return {
        (declaring_model(model, name), name): field.description
        for _, model in sections(RunConfig)
        for name, field in model.model_fields.items()
        if section_of(field) is None
    }


def test_the_page_is_current() -> None:
    assert PAGE.read_text() == render_page(), "write it anew with python -m trainer.config.reference"


def test_an_old_page_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "configuration.md"
    monkeypatch.setattr("trainer.config.reference.PAGE", page)
    assert main(["--check"]) == 1
    assert main([]) == 0
    assert main(["--check"]) == 0
    page.write_text(page.read_text().replace("Peak learning rate", "Learning rate"))
    assert main(["--check"]) == 1
    assert "out of date" in capsys.readouterr().err


def test_the_page_has_every_key_with_its_bounds_and_default() -> None:
    page = render_page()
    assert "| `checkpoint.from` | text or null | `null` |" in page
    assert "| `tracking.wandb.mode` | `auto`, `online`, `offline`, `disabled` | `auto` |" in page
    assert "| `data.validation_fraction` | number, >= 0, < 1 | `0.02` |" in page
    assert "| `steps` | integer or null, >= 1 | `null` |" in page
    assert page.count("\n| `") == sum(len(model.model_fields) for _, model in sections(RunConfig))


def test_every_field_has_a_sentence() -> None:
    assert [key for key, model in sections(RunConfig) if not (model.__doc__ or "").endswith(".")] == []
    sentences = _leaves()
    assert len(sentences) > 50
    wrong = [field for field, text in sentences.items() if not text or not text.endswith(".") or len(text) < 10]
    assert wrong == []


def _parse_without_rules(path: Path) -> ast.Module:
    """A source file less the functions that hold the rules: a field that only a rule reads has no effect."""
    tree = ast.parse(path.read_text())
    is_rule = re.compile("_?validate").match
    tree.body = [node for node in tree.body if not (isinstance(node, ast.FunctionDef) and is_rule(node.name))]
    return tree


def test_every_field_is_read_somewhere() -> None:
    sources = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    reads = find_reads(map(_parse_without_rules, sources), (model for _, model in sections(RunConfig)))
    assert _leaves().keys() - reads == ONE_VALUE_ONLY


def test_a_field_of_the_same_name_elsewhere_is_no_read() -> None:
    class Inner(StrictModel):
        name: str = "x"
        size: int = 0
        unused: int = 0

    class Outer(StrictModel):
        name: str = "x"
        inner: Inner = Field(default=Inner())

    source = """
class Holder:
    def __init__(self, config: Outer, other: Path) -> None:
        self._config = config
        self.other = other
        self.other.name

    def act(self):
        inner, two = self._config.inner, 2
        print(inner.size, two.unused, unknown.name)

def make() -> "Outer | None": ...

def act(path):
    whole = make()
    return [whole.inner.name for _ in path.name]
"""
    assert find_reads([ast.parse(source)], [Inner, Outer]) == {
        ("Outer", "inner"),
        ("Inner", "size"),
        ("Inner", "name"),
    }


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_load_and_say_how_they_are_started(path: Path) -> None:
    load_config(path)
    header = [line for line in path.read_text().splitlines() if line.startswith("#")]
    assert any(line.strip("# ").startswith(f"shardline run {path.relative_to(ROOT)}") for line in header)


def test_there_are_examples() -> None:
    assert {"quickstart", "gpt2_124m", "llama_1b"} <= {path.stem for path in EXAMPLES}


@pytest.mark.parametrize(("path", "num_ranks"), [("gpt2_124m", 8), ("llama_1b", 8), ("quickstart", 2)])
def test_examples_can_be_planned(path: str, num_ranks: int, tmp_path: Path) -> None:
    config = ROOT / "configs" / f"{path}.yaml"
    # Without GPUs a plan may have any number of ranks.
    plan = make_plan(str(config), [f"output_dir={tmp_path}", "data.tokenizer=train-bpe"], num_ranks, "torchrun")
    assert f"x {num_ranks} ranks" in plan.describe(None)
    assert preview(plan.config, plan.world).num_parameters


def test_the_quickstart_can_be_tried_in_a_few_steps() -> None:
    config = load_config(ROOT / "configs" / "quickstart.yaml", ["steps=20"])
    assert config.schedule.total_steps == load_config(ROOT / "configs" / "quickstart.yaml").num_steps
