"""What a result was measured on, as lines above its table."""

from collections.abc import Mapping
from typing import Any


def facts(header: Mapping[str, Any], title: str) -> list[str]:
    """The beginning of a result: what was measured where, from the row that says so."""
    hardware, code = header["hardware"], header["code"]
    revision = code.get("git_revision") or f"distribution {code.get('distribution_version')}"
    changed = ", with uncommitted changes" if code.get("git_diff") or code.get("git_untracked") else ""
    gpus = "; ".join(hardware["gpus"]) or "no GPU"
    versions = ", ".join(f"{name} {version}" for name, version in header["packages"].items())
    load = ", ".join(f"{value:.2f}" for value in header["load_average"])
    return [
        f"# {title}",
        "",
        f"- {header['time']}; revision {revision}{changed}",
        f"- {hardware['cpu']}, {hardware['usable_cores']} usable cores, {hardware['memory_gib']} GiB; {gpus}; "
        f"load average at the start {load}",
        f"- Python {header['python']}, {versions}",
        f"- `{' '.join(header['command'])}`",
    ]
