"""Power and clocks of a GPU, as the driver says them while something runs."""

import contextlib
import shutil
import subprocess
from collections.abc import Iterator
from statistics import median

_FIELDS = {
    "power_w": "power.draw",
    "sm_clock_mhz": "clocks.sm",
    "memory_clock_mhz": "clocks.mem",
    "temperature_c": "temperature.gpu",
}
_EVERY_MS = 200


@contextlib.contextmanager
def gpu_readings(*, enabled: bool) -> Iterator[dict[str, float]]:
    """Yields a dictionary that holds the medians of what ``nvidia-smi`` read, once the block has ended.

    It stays empty where there is no such command, and where the driver does not say.
    """
    found: dict[str, float] = {}
    if not enabled or shutil.which("nvidia-smi") is None:
        yield found
        return
    fields = ",".join(_FIELDS.values())
    command = ["nvidia-smi", "-i", "0", f"--query-gpu={fields}", "--format=csv,noheader,nounits", f"-lms={_EVERY_MS}"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        yield found
    finally:
        process.terminate()
        output, _ = process.communicate()
        columns: list[list[float]] = [[] for _ in _FIELDS]
        for line in output.splitlines():
            for column, text in zip(columns, line.split(","), strict=False):
                with contextlib.suppress(ValueError):
                    column.append(float(text))
        found |= {name: median(column) for name, column in zip(_FIELDS, columns, strict=True) if column}
