"""What a run does otherwise than the checkpoint that it continues from, where it is allowed to; imports no torch."""

from collections.abc import Callable

from sharding.ranks.errors import UserError
from trainer.checkpoint.manifest import Manifest
from trainer.config import RunConfig, parse_config
from trainer.config.frozen_config import allowed_changes
from trainer.run_folder.events import record_event
from trainer.run_folder.folder import RunFolder


def record_changes(manifest: Manifest, config: RunConfig, run_folder: RunFolder, notify: Callable[[str], None]) -> None:
    """Write down, and say, each setting of ``checkpoint.allow_changes`` that is another than the checkpoint's.

    Args:
        manifest: the checkpoint's.
        config: what the run goes on with.
        run_folder: the run.
        notify: informs a person.
    """
    try:
        before = parse_config(manifest.config, source="the checkpoint", has_rules=False)
    except UserError:
        # Of an earlier release, which may have named a setting otherwise; that the run may go on is known.
        return
    step = manifest.training.step
    for change in allowed_changes(before, config):
        values = {"setting": change.key, "old": change.old, "new": change.new}
        record_event(run_folder.path, "setting_changed", attempt=run_folder.newest_attempt(), step=step, **values)
        notify(f"{change.key}: {change.old} -> {change.new} at step {step}")
