"""What set-up adds to an environment that sees the packages of another one."""

import importlib.util
import subprocess
from pathlib import Path

from tests.support import ROOT


def test_launchers_of_another_environment_start_our_interpreter(tmp_path: Path) -> None:
    programs = tmp_path / ".venv" / "bin"
    programs.mkdir(parents=True)
    (programs / "python").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    (programs / "deepspeed").write_text("its own\n")
    (programs / "python").chmod(0o755)
    subprocess.run([ROOT / "scripts" / "launchers-of", ".venv"], cwd=tmp_path, check=True)
    for name, module in (
        ("torchrun", "torch.distributed.run"),
        ("accelerate", "accelerate.commands.accelerate_cli"),
    ):
        command = [programs / name, "--num 2", "-m", "trainer"]
        started = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
        assert started == ["-m", module, "--num 2", "-m", "trainer"]
        assert importlib.util.find_spec(module) is not None
    # What is there already is left alone.
    assert (programs / "deepspeed").read_text() == "its own\n"
