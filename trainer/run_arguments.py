"""Arguments of the commands that look at a run: its folder and a step."""

from pathlib import Path

from sharding.errors import UserError
from trainer.checkpoint.reader import CheckpointReader
from trainer.config import RunConfig
from trainer.data.prepared import Prepared, find_prepared
from trainer.run_folder import RunFolder


def open_checkpoint(run: str, step: int | None) -> CheckpointReader:
    """A run's checkpoint, the newest where no step is given.

    Raises:
        UserError: there is no such run or checkpoint, or it is damaged.
    """
    folder = RunFolder(Path(run))
    folder.frozen_config()
    if step is not None:
        return CheckpointReader(folder.checkpoint_path(step))
    newest = folder.newest_checkpoint()
    if newest is None:
        raise UserError(f"{run} has no checkpoint yet; train it first.")
    return CheckpointReader(newest[1])


def open_corpus(config: RunConfig) -> Prepared:
    """The corpus that a run was trained on.

    Raises:
        UserError: it is no longer there.
    """
    corpus = find_prepared(config.data)
    if corpus is None:
        raise UserError(
            "the run's prepared corpus is not there (data.cache_dir or $SHARDLINE_CACHE may have changed); "
            "prepare it again with `shardline data prepare`."
        )
    return corpus
