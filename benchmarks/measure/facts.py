"""What a result must say of where it was measured: machine, versions, revision."""

import os
import platform
import time
from collections.abc import Sequence
from typing import Any

from trainer.run_folder.provenance import code_revision, hardware_facts, package_version


def collect_facts(packages: Sequence[str]) -> dict[str, Any]:
    """Time, code, hardware, load and versions, as plain values; a package that is not installed is None."""
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "code": code_revision(),
        "hardware": hardware_facts(),
        "load_average": os.getloadavg(),
        "python": platform.python_version(),
        "packages": {name: package_version(name) for name in packages},
    }
