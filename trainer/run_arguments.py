"""Arguments of the commands that look at a run: its folder and a step."""

from pathlib import Path

from sharding.errors import UserError
from trainer.checkpoint.reader import CheckpointReader
from trainer.checkpoint.reference import checkpoints_of
from trainer.checkpoint.storage import checkpoint_folder, is_url, list_checkpoints
from trainer.config import RunConfig
from trainer.data.prepared import Prepared, find_prepared
from trainer.run_folder import RunFolder


def open_checkpoint(run: str, step: int | None) -> CheckpointReader:
    """A run's checkpoint, the newest where no step is given; the run may be the URL that its checkpoints lie under.

    Raises:
        UserError: there is no such run or checkpoint, or it is damaged.
    """
    if not is_url(run):
        RunFolder(Path(run)).frozen_config()
    checkpoints = checkpoints_of("RUN", run)
    if step is not None:
        return CheckpointReader(checkpoint_folder(checkpoints, step))
    found = list_checkpoints(checkpoints)
    if not found:
        raise UserError(f"{run} has no checkpoint yet; train it first.")
    return CheckpointReader(found[-1][1])


def open_corpus(config: RunConfig, fingerprint: str | None) -> Prepared:
    """The corpus that a run was trained on.

    Args:
        config: the run's.
        fingerprint: what its checkpoints say of the tokens; None where there is none.

    Raises:
        UserError: it is no longer there.
    """
    corpus = find_prepared(config.data, fingerprint)
    if corpus is None:
        raise UserError(
            "the run's prepared corpus is not there (data.cache_dir or $SHARDLINE_CACHE may have changed); "
            "prepare it again with `shardline data prepare`."
        )
    return corpus
