"""Nothing that a command starts imports from the folder that it is started in."""

import os
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest

from launcher.import_path import import_variables
from tests.support import PLANTED_VARIABLE, ROOT, command_environment, plant_modules

pytestmark = pytest.mark.timeout(60)

# Stands for libraries that take seconds to load: reaching it is far enough.
REACHED = "import os\nopen(os.environ['SHARDLINE_TEST_REACHED'], 'a').write(__name__ + '\\n')\nos._exit(43)\n"
SLOW_NAMES = ("torch", "transformers", "datasets", "tokenizers", "safetensors", "matplotlib", "deepspeed", "accelerate")


@pytest.fixture
def planted_folder(tmp_path: Path) -> Path:
    for name in SLOW_NAMES:
        (tmp_path / "reached" / name).mkdir(parents=True)
        (tmp_path / "reached" / name / "__init__.py").write_text(REACHED)
    return plant_modules(tmp_path / "planted")


def start_in(folder: Path, *arguments: object) -> tuple[subprocess.CompletedProcess[str], list[str], list[str]]:
    """Run a command in a folder; also returns what was imported from there, and which slow libraries were reached."""
    planted, reached = folder.parent / "planted.txt", folder.parent / "reached.txt"
    finished = subprocess.run(
        # As the installed command does, whose own folder is that of the script.
        [sys.executable, "-P", "-m", "launcher", *map(str, arguments)],
        cwd=folder,
        env=command_environment(
            PYTHONPATH=os.pathsep.join([str(ROOT), str(folder.parent / "reached")]),
            SHARDLINE_TEST_REACHED=str(reached),
            **{PLANTED_VARIABLE: str(planted)},
        ),
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    return finished, *(path.read_text().split() if path.exists() else [] for path in (planted, reached))


@pytest.mark.parametrize(
    "arguments",
    [
        ("run", "CONFIG"),
        ("drill", "kill-rank", "CONFIG"),
        ("doctor", "CONFIG"),
        ("parity", "CONFIG"),
        ("export", "RUN", "--to", "out"),
        ("generate", "RUN", "--prompt", "a"),
        ("report", "RUN"),
        ("tune", "CONFIG"),
        ("data", "prepare", "CONFIG"),
        ("data", "show", "RUN", "--step", "1"),
        ("checkpoint", "list", "RUN"),
        ("checkpoint", "verify", "RUN"),
        ("tracking", "sync", "RUN"),
        ("tracking", "dashboard", "RUN"),
        ("bench", "startup"),
        ("bench", "report"),
    ],
    ids=" ".join,
)
def test_a_command_started_in_a_folder_of_somebody_else(
    planted_folder: Path, make_config: Callable[..., Path], arguments: tuple[str, ...]
) -> None:
    # A corpus that is not prepared yet, so that a child is started for it.
    config = make_config(data={"cache_dir": str(planted_folder.parent / "cache")})
    (planted_folder / "config.yaml").write_bytes(config.read_bytes())
    places = {"CONFIG": config, "RUN": planted_folder}
    finished, planted, reached = start_in(planted_folder, *(places.get(argument, argument) for argument in arguments))
    assert planted == [], finished
    # Not ended before it had begun.
    assert reached or "Traceback" not in finished.stderr, finished


def test_only_two_files_start_an_interpreter() -> None:
    """Whoever starts Python elsewhere in the launcher would have to remember all this."""
    found = [
        path
        for path in sorted((ROOT / "launcher").rglob("*.py"))
        if "[sys.executable" in "".join(path.read_text().split())
    ]
    assert [path.name for path in found] == ["command.py", "import_path.py"]


def test_a_checkout_is_found_and_the_users_own_folders_stay(tmp_path: Path) -> None:
    own = os.pathsep.join(["/my/modules", "."])
    found = import_variables({"PYTHONPATH": own}, root=tmp_path)
    assert found == {"PYTHONSAFEPATH": "1", "PYTHONPATH": os.pathsep.join([str(tmp_path), own])}
    # What `export PYTHONPATH=$PYTHONPATH:/my/modules` leaves would be the working folder.
    assert import_variables({"PYTHONPATH": ":/my/modules:"}, root=Path("/my/modules"))["PYTHONPATH"] == "/my/modules"


def test_what_is_installed_does_not_come_before_the_standard_library() -> None:
    installed = Path(sysconfig.get_path("purelib"))
    assert import_variables({}, root=installed) == {"PYTHONSAFEPATH": "1"}
    assert import_variables({"PYTHONPATH": ""}, root=installed) == {"PYTHONSAFEPATH": "1", "PYTHONPATH": ""}
