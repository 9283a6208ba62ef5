"""Where a run comes from: code, packages, hardware, command."""

import hashlib
import json
import os
import platform
import re
import subprocess
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from trainer.config import RunConfig
from trainer.config.rules import World
from trainer.config.schema import OWN_MODULES
from trainer.config.secrets import redact, redact_arguments
from trainer.runtime.threads import threads_per_rank

# Beside the packages of a copy that a Slurm job runs with: the revision of what was copied.
FROZEN_REVISION_NAME = "revision.json"
_PACKAGES = ("torch", "transformers", "datasets", "tokenizers", "safetensors", "numpy", "wandb", "pydantic")
_TIMEOUT_S = 30.0


def collect_provenance(config: RunConfig, world: World, argv: list[str]) -> dict[str, Any]:
    """Facts about this attempt, as plain values; secrets in the command line and in changed code are redacted."""
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "argv": redact_arguments(argv, os.environ),
        "code": code_revision(),
        "own_code": own_code(config),
        "python": platform.python_version(),
        "packages": {name: package_version(name) for name in _PACKAGES},
        "hardware": hardware_facts(),
        "num_ranks": world.num_ranks,
        "threads_per_rank": threads_per_rank(config, world.num_local_ranks or world.num_ranks, os.environ),
    }


def code_revision() -> dict[str, Any]:
    """Git revision and uncommitted changes of Shardline's own checkout, or the installed distribution's version.

    Secrets in the changes are redacted. A Slurm job's copy of the code says what it was copied from.
    """
    root = Path(__file__).resolve().parents[2]
    if (frozen := root / FROZEN_REVISION_NAME).exists():
        return json.loads(frozen.read_text())
    if (root / ".git").exists():
        revision = _output(["git", "-C", str(root), "rev-parse", "HEAD"])
        if revision:
            diff = _output(["git", "-C", str(root), "diff", "HEAD"])
            return {
                "git_revision": revision,
                "git_diff": diff if diff is None else redact(diff, os.environ),
                "git_untracked": _output(["git", "-C", str(root), "ls-files", "--others", "--exclude-standard"]),
            }
    return {"distribution_version": package_version("shardline")}


def describe_version() -> str:
    """What runs here, in a line that a report of a fault can begin with; imports nothing of what it names."""
    root = Path(__file__).resolve().parents[2]
    revision = None
    if (root / ".git").exists():
        revision = _output(["git", "-C", str(root), "describe", "--always", "--dirty", "--exclude=*"])
    version = package_version("shardline") or "of a folder that is not installed"
    named = f"shardline {version} (revision {revision})" if revision else f"shardline {version}"
    packages = [f"{name} {package_version(name) or 'missing'}" for name in ("torch", "transformers")]
    return ", ".join([named, *packages, f"Python {platform.python_version()}"])


def own_code(config: RunConfig) -> dict[str, Any]:
    """By setting, what a run has of its owner's own: name, file, and SHA-256 of the file; imports none of it.

    Of what is installed there is the name alone, and of a package's modules the one that is named.
    """
    found: dict[str, Any] = {}
    for key, setting in OWN_MODULES:
        section = getattr(config, key)
        name, folder = getattr(section, setting), section.folder
        if name is None or ":" not in name:
            continue
        module = Path(*name.partition(":")[0].split("."))
        places = (Path(folder or "", module).with_suffix(".py"), Path(folder or "", module, "__init__.py"))
        file = None if folder is None else next((place for place in places if place.is_file()), None)
        digest = None if file is None else hashlib.sha256(file.read_bytes()).hexdigest()
        found[f"{key}.{setting}"] = {"name": name, "file": file and str(file), "sha256": digest}
    return found


def changed_code(run_dir: Path, attempt: int) -> list[str]:
    """A sentence for each file of the owner's own code that is another than at the attempt before."""
    earlier = next((n for n in range(attempt - 1, 0, -1) if provenance_file(run_dir, n).exists()), None)
    if earlier is None:
        return []
    before, now = _own_code_of(run_dir, earlier), _own_code_of(run_dir, attempt)
    return [
        f"{setting}={now[setting]['name']} is in {now[setting]['file']}, which has changed since attempt {earlier}"
        for setting in now.keys() & before.keys()
        if before[setting].get("sha256") != now[setting].get("sha256")
    ]


def provenance_file(run_dir: Path, attempt: int) -> Path:
    """Where the facts about an attempt are written."""
    return run_dir / f"provenance{'' if attempt == 1 else f'.attempt-{attempt}'}.json"


def _own_code_of(run_dir: Path, attempt: int) -> dict[str, Any]:
    try:
        # Earlier releases wrote nothing of it.
        return json.loads(provenance_file(run_dir, attempt).read_text()).get("own_code", {})
    except (OSError, ValueError):
        return {}


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


def package_version(package: str) -> str | None:
    """The version that is installed; None where there is none."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _output(command: list[str]) -> str | None:
    """What a command prints; None where there is no such command, or it fails or hangs: a run must not end of that."""
    try:
        finished = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return finished.stdout.strip() if finished.returncode == 0 else None
