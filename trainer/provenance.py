"""Where a run comes from: code, packages, hardware, command."""

import os
import platform
import re
import shutil
import subprocess
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from trainer.config import World

_PACKAGES = ("torch", "transformers", "datasets", "tokenizers", "safetensors", "numpy", "wandb", "pydantic")
_SECRET = re.compile(r"(?i)((?:key|token|secret|password)[^=\s]*=)\S+")


def collect_provenance(world: World, argv: list[str]) -> dict[str, Any]:
    """Facts about this attempt, as plain values; secrets in the command line are blotted out."""
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "argv": [_SECRET.sub(r"\1***", argument) for argument in argv],
        "code": code_revision(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "hardware": hardware_facts(),
        "num_ranks": world.num_ranks,
        "threads": os.environ.get("OMP_NUM_THREADS"),
    }


def code_revision() -> dict[str, Any]:
    """Git revision and uncommitted changes of Shardline's own checkout, or the installed distribution's version."""
    root = Path(__file__).resolve().parent.parent
    if (root / ".git").exists():
        revision = _output(["git", "-C", str(root), "rev-parse", "HEAD"])
        if revision:
            return {"git_revision": revision, "git_diff": _output(["git", "-C", str(root), "diff", "HEAD"])}
    return {"distribution_version": _version("shardline")}


def hardware_facts() -> dict[str, Any]:
    """Processor, cores, memory and GPUs of this machine."""
    gpus = _output(["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"])
    return {
        "platform": platform.platform(),
        "cpu": _cpu_model(),
        "usable_cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "gpus": gpus.splitlines() if gpus else [],
    }


def _cpu_model() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor()
    match = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return match.group(1) if match else platform.processor()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _output(command: list[str]) -> str | None:
    if shutil.which(command[0]) is None:
        return None
    finished = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    return finished.stdout.strip() if finished.returncode == 0 else None
