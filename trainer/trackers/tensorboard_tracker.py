"""TensorBoard: event files in the run's folder, each step once over all attempts."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainer.config import RunConfig, config_to_yaml
from trainer.files.atomic_files import write_atomically


class TensorBoardTracker:
    """One folder of event files per run; each attempt adds a file."""

    name = "tensorboard"

    def __init__(self, config: RunConfig, run_dir: Path) -> None:
        """Plan the files; nothing is opened yet.

        Args:
            config: the run.
            run_dir: its folder; event files go to ``tensorboard`` in it.
        """
        self._config = config
        self._folder = run_dir / "tensorboard"
        self._state_file = self._folder / "shardline.json"
        self._writer: Any = None
        self._written_step = 0

    def start(self, step: int) -> None:
        """Open an event file that continues the earlier ones; TensorBoard drops what those have beyond its start."""
        from torch.utils.tensorboard import SummaryWriter

        self._folder.mkdir(parents=True, exist_ok=True)
        written = json.loads(self._state_file.read_text())["written_step"] if self._state_file.exists() else 0
        self._written_step = min(written, step)
        is_continued = any(self._folder.glob("events.out.tfevents.*"))
        self._writer = SummaryWriter(str(self._folder), purge_step=self._written_step + 1 if is_continued else None)
        self._writer.add_text("config", _as_code(config_to_yaml(self._config)), self._written_step)

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Write one step's scalars."""
        if step <= self._written_step:
            return
        for name, value in metrics.items():
            if value is not None:
                self._writer.add_scalar(name, value, step)
        # What is flushed outlives a kill, and only what is flushed counts as written.
        self._writer.flush()
        self._written_step = step
        write_atomically(self._state_file, json.dumps({"written_step": step}))

    def finish(self, exit_code: int, summary: Mapping[str, Any]) -> None:
        """Add the summary as a table and close the file."""
        rows = "".join(f"| {name} | {value} |\n" for name, value in summary.items())
        self._writer.add_text("summary", f"| | |\n| --- | --- |\n{rows}", self._written_step)
        self._writer.close()

    def state(self) -> dict[str, Any]:
        """Nothing: the folder is the identity."""
        return {}


def _as_code(text: str) -> str:
    """Markdown that shows a text as it is."""
    return "".join(f"    {line}\n" for line in text.splitlines())
