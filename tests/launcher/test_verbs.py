"""Every verb is declared once: what ``shardline`` shows and reads is what the module that does the work reads."""

import contextlib
import importlib
import io
import pkgutil
from collections.abc import Iterator
from typing import Any

import pytest
import typer

import trainer.commands
from launcher.commands import app
from launcher.forwarding import Forwarded

# What commands share, and no command.
_SHARED = {"trainer.commands.arguments", "trainer.commands.entry"}


def _verbs(command: Any, name: str = "shardline") -> Iterator[tuple[str, Any]]:
    """Every verb below a command, by its words."""
    if not hasattr(command, "commands"):
        yield name, command
        return
    for word, inner in command.commands.items():
        yield from _verbs(inner, f"{name} {word}")


VERBS = dict(_verbs(typer.main.get_command(app)))
FORWARDED = {name: verb.callback.__module__ for name, verb in VERBS.items() if isinstance(verb, Forwarded)}


def _shown(show: Any) -> list[str]:
    """Lines of a help without the usage, which begins with the name of the program."""
    with contextlib.redirect_stdout(io.StringIO()) as output:
        show()
    usage, *rest = [line.strip() for line in output.getvalue().splitlines() if line.strip()]
    assert usage.startswith("Usage: ")
    # A long usage goes on below.
    return rest[next(index for index, line in enumerate(rest) if line.endswith(".")) :]


def test_every_module_of_a_command_is_a_verb_and_declares_it() -> None:
    modules = {f"trainer.commands.{module.name}" for module in pkgutil.iter_modules(trainer.commands.__path__)}
    assert sorted(FORWARDED.values()) == sorted(modules - _SHARED)


@pytest.mark.parametrize("name", VERBS)
def test_both_names_of_help_are_known(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    for option in ("-h", "--help"):
        with pytest.raises(SystemExit) as ended:
            app([*name.split()[1:], option], prog_name="shardline")
        assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert shown[: len(shown) // 2] == shown[len(shown) // 2 :]


@pytest.mark.parametrize("name", FORWARDED)
def test_help_comes_from_the_one_declaration(name: str) -> None:
    module = importlib.import_module(FORWARDED[name])

    def of_the_launcher() -> None:
        with pytest.raises(SystemExit):
            app([*name.split()[1:], "--help"], prog_name="shardline")

    def of_the_module() -> None:
        assert module.main(["--help"]) == 0

    shown = _shown(of_the_launcher)
    assert "--help" in "".join(shown)
    assert _shown(of_the_module) == shown


@pytest.mark.parametrize("name", FORWARDED)
def test_a_mistake_is_found_by_both_alike(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    module = importlib.import_module(FORWARDED[name])
    with pytest.raises(SystemExit) as refused:
        app([*name.split()[1:], "--no-such-option"], prog_name="shardline")
    ours = capsys.readouterr().err
    assert (refused.value.code, module.main(["--no-such-option"])) == (2, 2)
    assert "--no-such-option" in ours
    assert "--no-such-option" in capsys.readouterr().err


def test_the_doctor_refuses_a_number_of_ranks_that_another_has_started(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from trainer.commands.doctor import main

    place = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    assert main(["--nproc-per-node", "2"]) == 2
    assert "a launcher has started 1 ranks on this machine" in capsys.readouterr().err
