"""What a run has saved, and whether it is complete, for people and for programs."""

from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sharding.ranks.errors import UserError
from trainer.checkpoint.base_manifest import base_folder, list_bases
from trainer.checkpoint.reader import CheckpointReader
from trainer.checkpoint.reference import checkpoints_of
from trainer.checkpoint.stored_files import open_base, verify_base
from trainer.config import parse_config
from trainer.config.stages import config_of_step
from trainer.data.prepared import find_prepared
from trainer.files.storage import CheckpointPath, is_url, list_folders
from trainer.run_folder.folder import RunFolder
from trainer.run_folder.listing import CORRUPT_FOLDER, MANIFEST_NAME, list_checkpoints
from trainer.runtime.byte_sizes import size_text
from trainer.runtime.text_table import text_table


@dataclass(frozen=True)
class Inventory:
    """What a run has saved.

    Attributes:
        place: where it lies.
        metric: what the run is judged by, without ``eval/``.
        checkpoints: facts of each that can be read, oldest first.
        bases: frozen parameters that checkpoints refer to, and how many do.
        corrupt: a sentence for each that cannot.
    """

    place: CheckpointPath
    metric: str
    checkpoints: list[dict[str, Any]]
    bases: list[dict[str, Any]]
    corrupt: list[str]

    def values(self) -> dict[str, Any]:
        """It for programs."""
        return {"place": str(self.place), "checkpoints": self.checkpoints, "bases": self.bases, "corrupt": self.corrupt}

    def text(self) -> str:
        """It for people."""
        rows = [("step", "samples", "tokens", f"eval {self.metric}", "strategy", "ranks", "size", "folder")]
        for one in self.checkpoints:
            value = one["eval_metrics"].get(self.metric)
            rows.append(
                (
                    f"{one['step']:,}",
                    f"{one['num_samples']:,}",
                    f"{one['num_tokens']:,}",
                    "-" if value is None else f"{value:.4f}",
                    one["strategy"],
                    str(one["num_ranks"]),
                    size_text(one["num_bytes"]),
                    one["folder"],
                )
            )
        title = f"checkpoints in {self.place}" if self.checkpoints else f"no checkpoint in {self.place}"
        table = [text_table(rows, right=(0, 1, 2, 3, 5, 6))] if self.checkpoints else []
        bases = [
            f"{one['folder']}: {size_text(one['num_bytes'])} of frozen parameters, to which "
            f"{one['num_checkpoints']} of the checkpoints refer"
            for one in self.bases
        ]
        return "\n".join([title, *table, *bases, *self.corrupt])


def take_inventory(checkpoints: CheckpointPath) -> Inventory:
    """Read the manifests of all checkpoints of a run."""
    corrupt, found, bases, metric = [], [], [], "loss"
    referred: Counter[str | None] = Counter()
    for _, folder in list_checkpoints(checkpoints):
        try:
            manifest = CheckpointReader(folder).manifest
        except UserError as error:
            corrupt.append(f"{folder.name}: {error}")
            continue
        referred[manifest.base] += 1
        training = manifest.training
        metric = training.monitor.metric or metric
        found.append(
            {
                "step": training.step,
                "num_samples": training.num_samples,
                "num_tokens": training.num_tokens,
                "eval_metrics": training.eval_metrics,
                "strategy": manifest.strategy,
                "num_ranks": manifest.num_ranks,
                "num_bytes": sum(entry.num_bytes for entry in manifest.files.values()),
                "folder": folder.name,
            }
        )
    for folder in list_bases(checkpoints):
        num = referred[folder.name]
        try:
            num_bytes = sum(entry.num_bytes for entry in open_base(folder).files.values())
            bases.append({"folder": folder.name, "num_bytes": num_bytes, "num_checkpoints": num})
        except UserError as error:
            if num:
                corrupt.append(f"{folder.name}: {error}")
    return Inventory(checkpoints, metric, found, bases, corrupt)


@dataclass(frozen=True)
class Verified:
    """What came of comparing a checkpoint, or frozen parameters, with the manifest.

    Attributes:
        folder: its name.
        status: complete, corrupt, unused, or damaged: found corrupt before and moved away.
        note: what else is to be said, for people.
    """

    folder: str
    status: str
    note: str = ""

    def line(self) -> str:
        """It for people."""
        if self.status == "complete":
            return f"{self.folder}: complete{self.note and '; '}{self.note}"
        return f"{self.folder}: {self.note}"


def verify_checkpoints(checkpoints: CheckpointPath) -> Iterator[Verified]:
    """Compare all of all checkpoints with their manifests, and those with the corpus, one after another."""
    faults: dict[str, UserError | None] = {}
    for _, folder in list_checkpoints(checkpoints):
        try:
            reader = CheckpointReader(folder)
            reader.verify(with_base=False)
            base = reader.manifest.base
            if base is not None and base not in faults:
                # Once, however many checkpoints refer to it.
                faults[base] = _fault_of_base(base_folder(folder, base))
                if faults[base] is None:
                    yield _complete(base_folder(folder, base), open_base(base_folder(folder, base)).files)
            if base is not None and (fault := faults[base]) is not None:
                raise fault
            yield _complete(folder, reader.manifest.files, _compare_corpus(reader))
        except UserError as error:
            yield Verified(folder.name, "corrupt", str(error))
    for folder in list_bases(checkpoints):
        if folder.name not in faults:
            yield Verified(folder.name, "unused", "no checkpoint that can be read refers to it")
    for folder in list_folders(checkpoints / CORRUPT_FOLDER):
        yield Verified(f"{CORRUPT_FOLDER}/{folder.name}", "damaged", "was found corrupt and moved there")


def _fault_of_base(folder: CheckpointPath) -> UserError | None:
    """What is wrong with frozen parameters that checkpoints refer to."""
    try:
        verify_base(open_base(folder))
    except UserError as error:
        return error
    return None


def _complete(folder: CheckpointPath, files: Collection[str], note: str = "") -> Verified:
    extra = sorted({path.name for path in list_folders(folder)} - {*files, MANIFEST_NAME})
    notes = [note, f"not part of it: {', '.join(extra)}" if extra else ""]
    return Verified(folder.name, "complete", "; ".join(one for one in notes if one))


def _compare_corpus(reader: CheckpointReader) -> str:
    """Hold the data fingerprint against the prepared corpus; returns what is to be said where there is none.

    Raises:
        UserError: it is another corpus.
    """
    config = parse_config(reader.manifest.config, source=f"{reader.folder}", has_rules=False)
    config = config_of_step(config, reader.manifest.training.step)
    try:
        corpus = find_prepared(config.data, reader.manifest.data_fingerprint)
    except UserError as error:
        return f"its data fingerprint was not compared, since {error}"
    if corpus is None:
        return "its corpus is not prepared here, so the data fingerprint was not compared"
    if corpus.fingerprint != reader.manifest.data_fingerprint:
        raise UserError(
            f"checkpoint {reader.folder} was trained on another corpus (fingerprint "
            f"{reader.manifest.data_fingerprint[:12]}) than {corpus.folder} ({corpus.fingerprint[:12]}); restore the "
            "corpus, or continue with checkpoint.load=weights in another run."
        )
    return ""


def checkpoints_of_run(run: str) -> CheckpointPath:
    """The folder of a run's checkpoints.

    Args:
        run: its folder, or a URL below which checkpoints are.

    Raises:
        UserError: there is no such run.
    """
    if not is_url(run):
        RunFolder(Path(run)).frozen_config()
    return checkpoints_of("RUN", run)
