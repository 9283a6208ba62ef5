"""The base: frozen parameters are written once beside a run's checkpoints, which refer to them by a hash."""

import hashlib
import json
from collections.abc import Callable, Sequence

from sharding.part import Part
from sharding.ranks.errors import RunFailure, UserError
from sharding.ranks.object_exchange import broadcast_object, sum_integers_over_ranks
from sharding.ranks.process_group import Ranks
from sharding.replicas import content_hashes
from sharding.state import hash_over_ranks
from trainer.checkpoint.base_manifest import BaseManifest, CorruptBase, base_name, write_base_manifest
from trainer.checkpoint.rank_file import RankReport, write_rank_file
from trainer.checkpoint.stored_files import open_base
from trainer.checkpoint.writer import commit, files_of, prepare_checkpoint, tensors_of
from trainer.files.storage import CheckpointPath


class BaseKeeper:
    """Has a run's frozen parameters lie beside its checkpoints before one refers to them.

    Attributes:
        name: of the folder that the newest checkpoint refers to, or will; None where nothing is frozen.
    """

    def __init__(self, checkpoints: CheckpointPath, ranks: Ranks, before_change: Callable[[], None]) -> None:
        """Bind to a run; nothing is looked at yet.

        Args:
            checkpoints: where its checkpoints are.
            ranks: this rank's place.
            before_change: called on rank 0 before anything is written or removed; raises if the folder was lost.
        """
        self._checkpoints = checkpoints
        self._ranks = ranks
        self._before_change = before_change
        self.name: str | None = None
        self._contents_hash = ""
        self._seen: list[int] | None = None

    def keep(
        self, parts: Sequence[Part], step: int, before_write: Callable[[], None], settle: Callable[[], None]
    ) -> None:
        """See to it that frozen parameters are there, whole; every rank must call it.

        They are written where they are not, and waited for. At every save it is asked whether they are what they were:
        had somebody changed them, who thought them frozen, the next checkpoint would have a base of its own.

        Args:
            parts: this rank's of them; none where nothing is frozen.
            step: of the checkpoint that will refer to them.
            before_write: called where this rank begins to write.
            settle: called before another base than the last is looked for: waits for what may be removing it.

        Raises:
            UserError: a rank could not write.
            RunFailure: the folder was lost, or the storage is away.
        """
        if not parts:
            self.name = None
            return
        if self._have_changed(parts):
            self._contents_hash = self._hash(parts)
        contents_hash = self._contents_hash
        folder = self._checkpoints / base_name(contents_hash)
        if folder.name != self.name:
            settle()
        error, is_there = broadcast_object(_look(folder) if self._ranks.rank == 0 else (None, False), self._ranks)
        if error is not None:
            raise error
        if not is_there:
            prepare_checkpoint(folder, list(parts), step, self._ranks, self._before_change)
            report = write_rank_file(folder, list(parts), self._ranks.rank, before_write)

            def write(reports: list[RankReport]) -> None:
                tensors, files = tensors_of(reports), files_of(reports)
                write_base_manifest(folder, BaseManifest(contents_hash=contents_hash, tensors=tensors, files=files))

            commit(folder, report, step, write, self._ranks, self._before_change)
        self.name = folder.name

    def _have_changed(self, parts: Sequence[Part]) -> bool:
        """Whether any rank's are others than at the last save; as cheap as reading them once."""
        before, self._seen = self._seen, content_hashes([part.tensor for part in parts]).tolist()
        return sum_integers_over_ranks(int(before != self._seen), self._ranks) > 0

    def _hash(self, parts: Sequence[Part]) -> str:
        values = hash_over_ranks(parts, self._ranks)
        tensors = sorted((part.name, str(part.tensor.dtype), list(part.global_shape)) for part in parts)
        return hashlib.sha256(json.dumps([values, tensors]).encode()).hexdigest()


def _look(folder: CheckpointPath) -> tuple[UserError | RunFailure | None, bool]:
    """Whether a base is there, as far as sizes tell; and why it cannot be looked at."""
    try:
        open_base(folder)
    except CorruptBase:
        # What is there in part is written anew.
        return None, False
    except (UserError, RunFailure) as error:
        return error, False
    return None, True
