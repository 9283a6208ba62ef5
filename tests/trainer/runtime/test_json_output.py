"""Documents for programs: nothing else reaches standard output, whoever prints."""

import json
import subprocess
import sys
from pathlib import Path

from tests.support import ROOT, command_environment

_PROGRAM = """
import math, os, subprocess, sys
from pathlib import Path
from trainer.runtime.json_output import output_aside, print_json
with output_aside(True):
    print("of Python")
    os.write(1, b"of an extension\\n")
    subprocess.run(["echo", "of a child"], check=True)
print_json({"loss": math.nan, "path": Path("a/b"), 3: [1.5, -math.inf, (2,)]})
"""


def test_only_the_document_is_on_standard_output() -> None:
    finished = subprocess.run(
        [sys.executable, "-c", _PROGRAM],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=command_environment(),
        check=True,
    )
    assert json.loads(finished.stdout) == {"loss": None, "path": str(Path("a/b")), "3": [1.5, None, [2]]}
    assert sorted(finished.stderr.splitlines()) == ["of Python", "of a child", "of an extension"]
