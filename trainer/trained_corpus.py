"""Which corpus a run goes on with, whatever has become of its sources; imports no torch."""

import contextlib

from sharding.errors import UserError
from trainer.checkpoint.manifest import read_manifest
from trainer.checkpoint.reference import resolve_checkpoint
from trainer.checkpoint.storage import list_checkpoints
from trainer.config import RunConfig
from trainer.run_folder import RunFolder


def trained_fingerprint(config: RunConfig, run_folder: RunFolder) -> str | None:
    """The data fingerprint of the checkpoint that a run goes on from, be it another run's; None where it begins anew.

    One that cannot be read is passed over here: whoever loads it says so.
    """
    with contextlib.suppress(UserError):
        for _, folder in reversed(list_checkpoints(run_folder.checkpoints_dir)):
            with contextlib.suppress(UserError):
                return read_manifest(folder).data_fingerprint
    if config.checkpoint.from_ is not None and config.checkpoint.load == "all":
        with contextlib.suppress(UserError, OSError):
            return read_manifest(resolve_checkpoint(config.checkpoint.from_)).data_fingerprint
    return None
