"""Which corpus a run goes on with, whatever has become of its sources; imports no torch."""

import contextlib

from sharding.ranks.errors import UserError
from trainer.checkpoint.manifest import Manifest, read_manifest
from trainer.checkpoint.reference import resolve_checkpoint
from trainer.config import RunConfig, parse_config
from trainer.config.data import DataConfig
from trainer.config.expansion import expand_settings
from trainer.config.stages import stages_of
from trainer.run_folder.folder import RunFolder
from trainer.run_folder.listing import list_checkpoints

# Checkpoints of earlier formats hold paths as they were written, with ~.
_FIRST_EXPANDED = 4


def trained_fingerprint(config: RunConfig, run_folder: RunFolder) -> str | None:
    """The data fingerprint of the checkpoint that a run goes on from, its own or another run's.

    A checkpoint that cannot be read is passed over here: whoever loads it says so.

    Returns:
        None where the run begins anew, and where the checkpoint is of other settings of ``data``: who names another
        corpus must not get the old one.
    """
    manifest = _manifest(config, run_folder)
    if manifest is not None:
        # ValueError is pydantic's too.
        with contextlib.suppress(ValueError, UserError):
            values = {"data": manifest.config.get("data")}
            if manifest.format_version < _FIRST_EXPANDED:
                expand_settings(values)
            if _corpus_settings(DataConfig.model_validate(values["data"])) == _corpus_settings(config.data):
                return manifest.data_fingerprint
    return None


def trained_fingerprints(config: RunConfig, run_folder: RunFolder) -> dict[str, str]:
    """The same of each stage of a run, by name; of a run without stages by the empty name."""
    if not config.stages:
        fingerprint = trained_fingerprint(config, run_folder)
        return {} if fingerprint is None else {"": fingerprint}
    manifest = _manifest(config, run_folder)
    if manifest is None or not manifest.training.stages:
        return {}
    try:
        trained = stages_of(parse_config(manifest.config, source="the checkpoint", has_rules=False))
    except UserError:
        return {}
    settings = {stage.name: _corpus_settings(stage.config.data) for stage in trained}
    return {
        stage.name: manifest.training.stages[stage.name].data_fingerprint
        for stage in stages_of(config)
        if stage.name in manifest.training.stages and settings.get(stage.name) == _corpus_settings(stage.config.data)
    }


def _manifest(config: RunConfig, run_folder: RunFolder) -> Manifest | None:
    with contextlib.suppress(UserError):
        for _, folder in reversed(list_checkpoints(run_folder.checkpoints_dir)):
            with contextlib.suppress(UserError):
                return read_manifest(folder)
    if config.checkpoint.from_ is not None and config.checkpoint.load == "all":
        with contextlib.suppress(UserError, OSError):
            return read_manifest(resolve_checkpoint(config.checkpoint.from_))
    return None


def _corpus_settings(config: DataConfig) -> DataConfig:
    """Without what says nothing of the tokens."""
    return config.model_copy(update={"cache_dir": None, "num_workers": 0, "skip_samples": ()})
