"""The offline parts of a run's attempts become one wandb run.

Each part is uploaded by ``wandb sync``, one after the other, in the order of the attempts.
"""

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from sharding.ranks.errors import RunFailure, UserError
from trainer.config.tracking import WandbConfig
from trainer.run_folder.folder import RunFolder
from trainer.run_folder.lease import Lease
from trainer.trackers.wandb_files import WandbPart, drop_from_part, read_parts
from trainer.trackers.wandb_tracker import WandbIdentity, has_key


def sync_run(run_dir: Path, console: Console, *, dry_run: bool) -> None:
    """Upload what a run's attempts left offline.

    Args:
        run_dir: the run's folder.
        console: where to show the parts.
        dry_run: show the parts and the commands, and upload nothing.

    Raises:
        UserError: there is no such run, it is in use, there is nothing of wandb in it, or no key.
        RunFailure: a part could not be uploaded; later parts are left for another try, so that order is kept.
    """
    settings = RunFolder(run_dir).newest_config().tracking.wandb
    identity = WandbIdentity.read(run_dir)
    if identity is None:
        raise UserError(f"{run_dir} holds nothing of wandb; it is tracked where tracking.wandb.mode is not disabled.")
    parts = read_parts(run_dir, identity.run_id)
    waiting = [part for part in parts if part.is_waiting]
    console.print(_table(run_dir, identity.run_id, parts))
    _say_what_is_missing(run_dir, parts, console)
    if not waiting:
        console.print("nothing to upload", highlight=False)
        return
    if dry_run:
        for part in waiting:
            console.print(shlex.join(sync_command(part, identity.run_id, settings)), highlight=False)
        return
    _check_key()
    # Nobody may write to a part while it is mended and read.
    lease = Lease.acquire(run_dir)
    try:
        # Where some attempts were online, what the server has tells nothing about the parts of others.
        is_all_offline = all(part.is_offline for part in parts)
        sent_step = _server_step(identity.run_id, settings) if is_all_offline else 0
        for part in waiting:
            # wandb would take half a record for a failure, and would send lines twice of which an upload that broke off
            # has sent some.
            if part.is_torn or min(part.steps, default=sent_step + 1) <= sent_step:
                drop_from_part(part, sent_step)
            _upload(part, identity.run_id, settings)
            # Remembered, since uploaded parts may be deleted.
            identity = replace(identity, sent_step=max(identity.sent_step, part.last_step))
            identity.write(run_dir)
            console.print(f"uploaded {part.file.parent.name}", highlight=False)
    finally:
        lease.release()


def sync_command(part: WandbPart, run_id: str, settings: WandbConfig) -> list[str]:
    """The command that uploads one part into the run; keys stay in the environment."""
    command = [sys.executable, "-m", "wandb", "sync", f"--id={run_id}", f"--project={settings.project}"]
    if settings.entity is not None:
        command.append(f"--entity={settings.entity}")
    return [*command, str(part.file.parent)]


def _upload(part: WandbPart, run_id: str, settings: WandbConfig) -> None:
    # An offline mode from the environment would keep wandb from uploading; resuming makes it add to earlier parts.
    environment = {name: value for name, value in os.environ.items() if name not in ("WANDB_MODE", "WANDB_SERVICE")}
    environment |= {"WANDB_RESUME": "allow", "WANDB_SILENT": "false"}
    # wandb's logs about uploads go to the run as well, not to wherever this was started.
    environment["WANDB_DIR"] = str(part.file.parent.parent.parent.absolute())
    finished = subprocess.run(
        sync_command(part, run_id, settings), env=environment, capture_output=True, text=True, check=False
    )
    # wandb exits with 0 even where it could not upload; the mark is what it leaves after a success.
    if finished.returncode or not part.file.with_suffix(".wandb.synced").exists():
        said = [line.strip() for line in (finished.stdout + finished.stderr).splitlines() if line.strip()]
        raise RunFailure(
            f"{part.file.parent} was not uploaded; wandb says: {' '.join(said[-3:]) or 'nothing'}; "
            "the same command goes on from here."
        )


def _server_step(run_id: str, settings: WandbConfig) -> int:
    """The last step that the server has of a run; 0 where it does not know the run."""
    import wandb

    try:
        api = wandb.Api()
        run = api.run(f"{settings.entity or api.default_entity}/{settings.project}/{run_id}")
        return max(run.lastHistoryStep, 0)
    except (wandb.errors.Error, ValueError) as error:
        if "Could not find" in str(error):
            return 0
        raise RunFailure(f"nothing was uploaded; wandb says: {' '.join(str(error).split())}") from None


def _check_key() -> None:
    import wandb

    server = wandb.setup(wandb.Settings(silent=True)).settings.base_url
    if not has_key(os.environ, server):
        raise UserError(
            f"there is no wandb key for {server}; set WANDB_API_KEY or use wandb login, and run this again "
            "(--dry-run shows what would be uploaded)."
        )


def _table(run_dir: Path, run_id: str, parts: Sequence[WandbPart]) -> Table:
    table = Table(title=f"wandb run {run_id} of {run_dir}")
    for header in ("attempt", "steps", "lines", "state", "folder"):
        table.add_column(header, justify="right" if header in ("attempt", "lines") else "left", overflow="fold")
    for part in parts:
        steps = f"{part.steps[0]}-{part.steps[-1]}" if part.steps else "none"
        state = "uploaded while it ran" if not part.is_offline else "uploaded" if part.is_synced else "waits"
        if part.is_torn:
            state += ", end torn by a kill"
        table.add_row(str(part.attempt or "?"), steps, str(len(part.steps)), state, part.file.parent.name)
    return table


def _say_what_is_missing(run_dir: Path, parts: Sequence[WandbPart], console: Console) -> None:
    path = RunFolder(run_dir).metrics_file
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    logged = {int(json.loads(line)["step"]) for line in lines if line.endswith("\n")}
    missing = sorted(logged - {step for part in parts for step in part.steps})
    if missing and all(part.is_offline for part in parts):
        console.print(
            f"{len(missing)} logged steps from {missing[0]} to {missing[-1]} are in metrics.jsonl only, as after a "
            "kill; the run's next attempt sends them",
            highlight=False,
        )
