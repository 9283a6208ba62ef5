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


def say_other_precision(manifest: Manifest, rule: int | None, notify: Callable[[str], None]) -> None:
    """Say that a run in 16 bits continues from a checkpoint that was computed otherwise, or in fp32.

    Args:
        manifest: the checkpoint's.
        rule: what the run goes on by; None in fp32, of which there is nothing to say.
        notify: informs a person.
    """
    if rule is not None and manifest.precision_rule != rule:
        notify(
            f"precision: step {manifest.training.step} was computed in fp32, or by an earlier release, in whose 16 "
            "bits parallel.strategy said what is rounded; from here on every strategy computes with 16-bit "
            "parameters (docs/training.md)"
        )
