"""The pages: links lead somewhere, commands and keys exist, and nothing is said of what is not there."""

import ast
import functools
import re
import shlex
from pathlib import Path

import pytest
import typer

from launcher.commands import app
from tests.support import ROOT
from trainer.config import RunConfig, load_config
from trainer.config.reference import sections
from trainer.config.rules import World, validate

PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
KEYS = {key: {field.alias or name for name, field in model.model_fields.items()} for key, model in sections(RunConfig)}

# What a link's name leads to: of a figure, its file and field.
_DEFINITION = re.compile(r"^\[[\w .-]+\]: .*$", re.MULTILINE)
# They look like keys.
FILES = {"metrics.jsonl", "metrics.discarded.jsonl", "model.onnx", "model.safetensors"}


def _commands() -> dict[str, set[str]]:
    """Every command, such as `data show`, with its options."""
    group = typer.main.get_command(app)
    found = {}
    for name, command in group.commands.items():  # type: ignore[attr-defined]
        for inner_name, inner in getattr(command, "commands", {"": command}).items():
            options = {option for parameter in inner.params for option in parameter.opts if option.startswith("--")}
            found[f"{name} {inner_name}".strip()] = options
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text())
    assert [target for target in targets if "://" not in target and not (page.parent / target).exists()] == []


def _anchors(page: Path) -> set[str]:
    """What a link may name behind ``#``, as a forge makes it of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_into_a_page_find_their_heading(page: Path) -> None:
    for target, anchor in re.findall(r"\]\(([^)#\s]*)#([^)]+)\)", page.read_text()):
        if "://" not in target:
            assert anchor in _anchors(page.parent / target if target else page), f"{page.name}: {target}#{anchor}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_and_options_exist(page: Path) -> None:
    commands = _commands()
    text = _DEFINITION.sub("", page.read_text())
    for line in re.findall(r"(?<!from )shardline ((?:[a-z]+|\||\\)+[^`\n]*)", text):
        words = line.replace("\\|", "|").split()
        first = words[0]
        seconds = words[1].split("|") if len(words) > 1 and not any(name == first for name in commands) else [""]
        for second in seconds:
            name = f"{first} {second}".strip()
            assert name in commands, f"{page.name}: shardline {line}"
            unknown = set(re.findall(r"(?<!\S)\[?(--[a-z-]+)", line)) - commands[name]
            if unknown and first in ("bench", "tune"):
                # Its own, and those that all of them share.
                benchmark = words[1] if first == "bench" else first
                files = [
                    f for f in (ROOT / "benchmarks").rglob("*.py") if {f.parent.name, f.stem} & {benchmark, "measure"}
                ]
                unknown -= {option for file in files for option in re.findall(r'"(--[a-z-]+)"', file.read_text())}
            assert unknown == set(), f"{page.name}: shardline {line}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_keys_exist(page: Path) -> None:
    for key in re.findall(r"(?<![\w./-])((?:[a-z_]+\.)+[a-z_]+)(?=[=:`*, ])", page.read_text()):
        section, _, name = key.rpartition(".")
        if key not in FILES:
            assert section not in KEYS or name in KEYS[section], f"{page.name}: {key}"


@functools.cache
def _tests_of(file: Path) -> dict[str, bool]:
    """Each test of a file, and whether it or one of its cases is marked slow."""
    functions = [node for node in ast.parse(file.read_text()).body if isinstance(node, ast.FunctionDef)]
    return {
        node.name: any("mark.slow" in ast.unparse(decorator) for decorator in node.decorator_list)
        for node in functions
        if node.name.startswith("test_")
    }


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_tests_exist(page: Path) -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", page.read_text())
    missing = [file for file, _ in named if not (ROOT / file).is_file()]
    assert missing == []
    assert [f"{file}::{test}" for file, test in named if test and test not in _tests_of(ROOT / file)] == []


def test_promises_say_which_tests_are_slow() -> None:
    page = (ROOT / "docs" / "promises.md").read_text()
    rows = [line for line in page.splitlines() if line.startswith("| ") and "`tests/" in line]
    assert len(rows) > 50
    wrong = []
    for row in rows:
        promise, held_by = row.strip("| ").split(" | ")
        tests = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", held_by)
        if any(_tests_of(ROOT / file).get(test, False) for file, test in tests) != ("(s)" in promise):
            wrong.append(promise)
    assert wrong == []


def test_each_part_has_settings_a_command_and_a_test() -> None:
    page = (ROOT / "docs" / "tasks.md").read_text()
    rows = [line for line in page.splitlines() if line.startswith("| ") and not line.startswith(("| part ", "| --- "))]
    assert len(rows) >= 40
    for row in rows:
        _, configuration, command, held_by = row.strip("| ").split(" | ")
        assert "`" in configuration or "](" in configuration, row
        assert re.search(r"`tests/", held_by), row
        words = shlex.split(command.strip("`"))
        assert words.pop(0) == "shardline", row
        ranks = int(words[words.index("--nproc-per-node") + 1]) if "--nproc-per-node" in words else 2
        for file in (word for word in words if word.startswith("configs/")):
            config = load_config(ROOT / file, [word for word in words if "=" in word])
            validate(config, World(ranks, has_gpu="gpt2" in file))


def test_every_page_is_reached_from_the_index() -> None:
    index = ROOT / "docs" / "index.md"
    linked = {(index.parent / target).resolve() for target in re.findall(r"\]\(([^)#]+)", index.read_text())}
    pages = {*(ROOT / "docs").rglob("*.md"), *(ROOT / "benchmarks").glob("*.md"), *(ROOT / "slurm").rglob("*.md")}
    assert len(pages) > 20
    assert pages - {index} - linked == set()
    assert "](docs/index.md)" in (ROOT / "README.md").read_text()


def test_pages_are_ascii() -> None:
    assert [page.name for page in PAGES if not page.read_text().isascii()] == []


def test_each_trouble_has_a_test_and_is_said_as_it_is_quoted() -> None:
    page = (ROOT / "docs" / "jobs" / "trouble.md").read_text()
    troubles = page.split("\n### ")[1:]
    assert len(troubles) > 20
    assert [trouble.splitlines()[0] for trouble in troubles if not re.search(r"\nHeld by `tests/", trouble)] == []
    sources = [path.read_text() for name in ("launcher", "trainer", "sharding") for path in (ROOT / name).rglob("*.py")]
    said = " ".join(" ".join(re.sub(r'"\n\s*f?"', "", source).split()) for source in sources)
    for quoted in re.findall(r'^### "([^"]+)"', page, re.MULTILINE):
        assert quoted in said, quoted


def _paragraphs(page: Path) -> list[str]:
    """Prose of a page, each item of a list by itself: without code, tables and what is drawn by indentation."""
    text = re.sub(r"^```.*?^```$", "", _DEFINITION.sub("", page.read_text()), flags=re.DOTALL | re.MULTILINE)
    parts = [item for part in re.split(r"\n\s*\n", text) for item in re.split(r"\n(?=\s*(?:-|\d+\.) )", part)]
    return [" ".join(part.split()) for part in parts if not part.startswith(("|", "    "))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_no_paragraph_is_too_long_to_read(page: Path) -> None:
    if page.name != "CHANGELOG.md" and page.stem != "configuration":
        assert [part[:60] for part in _paragraphs(page) if len(part) > 750] == []
