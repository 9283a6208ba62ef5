"""What a result must say of where it was measured: machine, versions, revision."""

import os
import platform
import time
from collections.abc import Sequence
from importlib import metadata
from typing import Any

from trainer.provenance import code_revision, hardware_facts


def collect_facts(packages: Sequence[str]) -> dict[str, Any]:
    """Time, code, hardware, load and versions, as plain values; a package that is not installed is None."""
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "code": code_revision(),
        "hardware": hardware_facts(),
        "load_average": os.getloadavg(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in packages},
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
