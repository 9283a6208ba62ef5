"""What a run has saved, and whether it is complete, as lines for a person."""

from collections.abc import Collection
from pathlib import Path

from rich.console import Console
from rich.table import Table

from sharding.ranks.errors import EXIT_BAD_INPUT, EXIT_FINISHED, UserError
from trainer.checkpoint.base_manifest import base_folder, list_bases
from trainer.checkpoint.reader import CheckpointReader
from trainer.checkpoint.reference import checkpoints_of
from trainer.checkpoint.stored_files import open_base, verify_base
from trainer.config import parse_config
from trainer.data.prepared import find_prepared
from trainer.files.storage import CheckpointPath, is_url, list_folders
from trainer.run_folder.folder import RunFolder
from trainer.run_folder.listing import CORRUPT_FOLDER, MANIFEST_NAME, list_checkpoints


def show_checkpoints(checkpoints: CheckpointPath, console: Console) -> int:
    """Show the checkpoints of a run; returns the exit status."""
    corrupt, manifests = [], {}
    for _, folder in list_checkpoints(checkpoints):
        try:
            manifests[folder] = CheckpointReader(folder).manifest
        except UserError as error:
            corrupt.append(f"{folder.name}: {error}")
    monitored = [manifest.training.monitor.metric for manifest in manifests.values()]
    metric = next((name for name in reversed(monitored) if name), "loss")
    table = Table(title=f"checkpoints in {checkpoints}")
    for header in ("step", "samples", "tokens", f"eval {metric}", "strategy", "ranks", "MiB", "folder"):
        table.add_column(header, justify="left" if header in ("strategy", "folder") else "right")
    for folder, manifest in manifests.items():
        num_bytes = sum(entry.num_bytes for entry in manifest.files.values())
        training = manifest.training
        table.add_row(
            f"{training.step:,}",
            f"{training.num_samples:,}",
            f"{training.num_tokens:,}",
            f"{training.eval_metrics[metric]:.4f}" if metric in training.eval_metrics else "",
            manifest.strategy,
            str(manifest.num_ranks),
            f"{num_bytes / 2**20:,.1f}",
            folder.name,
        )
    console.print(table)
    for folder in list_bases(checkpoints):
        num = sum(manifest.base == folder.name for manifest in manifests.values())
        try:
            num_bytes = sum(entry.num_bytes for entry in open_base(folder).files.values())
            what = f"{num_bytes / 2**20:,.1f} MiB of frozen parameters, to which {num} of the checkpoints refer"
            console.print(f"{folder.name}: {what}", highlight=False)
        except UserError as error:
            if num:
                corrupt.append(f"{folder.name}: {error}")
    for sentence in corrupt:
        console.print(sentence, highlight=False)
    return EXIT_BAD_INPUT if corrupt else EXIT_FINISHED


def verify_checkpoints(checkpoints: CheckpointPath, console: Console) -> int:
    """Compare all of all checkpoints with their manifests, and those with the corpus; returns the exit status."""
    exit_code = EXIT_FINISHED
    faults: dict[str, UserError | None] = {}
    for _, folder in list_checkpoints(checkpoints):
        try:
            reader = CheckpointReader(folder)
            reader.verify(with_base=False)
            base = reader.manifest.base
            if base is not None and base not in faults:
                # Once, however many checkpoints refer to it.
                faults[base] = _fault_of_base(base_folder(folder, base), console)
            if base is not None and (fault := faults[base]) is not None:
                raise fault
            note = _compare_corpus(reader) + _extra_files(folder, reader.manifest.files)
            console.print(f"{folder.name}: complete{note}", highlight=False)
        except UserError as error:
            console.print(f"{folder.name}: {error}", highlight=False)
            exit_code = EXIT_BAD_INPUT
    for folder in list_bases(checkpoints):
        if folder.name not in faults:
            console.print(f"{folder.name}: no checkpoint that can be read refers to it", highlight=False)
    for folder in list_folders(checkpoints / CORRUPT_FOLDER):
        console.print(f"damaged/{folder.name}: was found corrupt and moved there", highlight=False)
    return exit_code


def _fault_of_base(folder: CheckpointPath, console: Console) -> UserError | None:
    """What is wrong with frozen parameters that checkpoints refer to; says so where they are complete."""
    try:
        base = open_base(folder)
        verify_base(base)
    except UserError as error:
        return error
    console.print(f"{folder.name}: complete{_extra_files(folder, base.files)}", highlight=False)
    return None


def _extra_files(folder: CheckpointPath, files: Collection[str]) -> str:
    extra = sorted({path.name for path in list_folders(folder)} - {*files, MANIFEST_NAME})
    return f"; not part of it: {', '.join(extra)}" if extra else ""


def _compare_corpus(reader: CheckpointReader) -> str:
    """Hold the data fingerprint against the prepared corpus; returns what is to be said where there is none.

    Raises:
        UserError: it is another corpus.
    """
    config = parse_config(reader.manifest.config, source=f"{reader.folder}", has_rules=False)
    try:
        corpus = find_prepared(config.data, reader.manifest.data_fingerprint)
    except UserError as error:
        return f"; its data fingerprint was not compared, since {error}"
    if corpus is None:
        return "; its corpus is not prepared here, so the data fingerprint was not compared"
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
