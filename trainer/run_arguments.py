"""Arguments of the commands that look at a run: its folder, a step, and what code they may run for it."""

import argparse
from dataclasses import dataclass
from pathlib import Path

from sharding.errors import UserError
from trainer.checkpoint.reader import CheckpointReader
from trainer.checkpoint.reference import checkpoints_of
from trainer.checkpoint.storage import checkpoint_folder, is_url, list_checkpoints
from trainer.config import RunConfig
from trainer.data.prepared import Prepared, find_prepared
from trainer.run_folder import RunFolder


@dataclass(frozen=True)
class AllowedCode:
    """Python code that whoever calls a command lets it run; what a run's own files ask for is no permission.

    Attributes:
        task: ``module:Class`` of a task that may be imported.
        trust_remote_code: whether a model's own code may run.
    """

    task: str | None = None
    trust_remote_code: bool = False

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        """Give a command the switches."""
        parser.add_argument("--task")
        parser.add_argument("--trust-remote-code", action="store_true")

    @classmethod
    def of(cls, options: argparse.Namespace) -> "AllowedCode":
        """What a command's switches allow."""
        return cls(task=options.task, trust_remote_code=options.trust_remote_code)

    def check(self, config: RunConfig, source: object) -> None:
        """Refuse a run whose configuration asks for code that is not allowed.

        Args:
            config: the run's configuration, as its files have it.
            source: the run or checkpoint, to speak of.

        Raises:
            UserError: it asks for a task's or a model's own code.
        """
        if ":" in config.task.name and self.task != config.task.name:
            place = "" if config.task.folder is None else f" in task.folder={config.task.folder}"
            other = "" if self.task is None else f", not {self.task}"
            raise UserError(
                f"{source} asks for Python code by task.name={config.task.name}{place}{other}; read that code, and "
                f"give --task {config.task.name} to run it."
            )
        if config.model.trust_remote_code and not self.trust_remote_code:
            raise UserError(
                f"{source} asks for Python code of model.pretrained={config.model.pretrained} by "
                "model.trust_remote_code=true; read that code, and give --trust-remote-code to run it."
            )


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
