"""Preparation of rows: read, divided, counted and written, one Arrow file for each split."""

import itertools
import json
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from sharding.ranks.errors import UserError
from trainer.config.data import DataConfig
from trainer.config.rows import SplitConfig
from trainer.data.identity import ROWS_VERSION
from trainer.data.pack import describe_file
from trainer.data.prepared_folder import MANIFEST_NAME, TOKENIZER_FOLDER
from trainer.data.prepared_rows import PreparedRows
from trainer.data.progress import StageProgress
from trainer.data.row_kinds import RowKind, TableRows
from trainer.data.row_labels import check_labels, label_column, label_of, learn_labels
from trainer.data.row_media import AudioRows, ImageRows
from trainer.data.row_sources import group_of, read_raw_rows
from trainer.data.row_splits import RowSpool
from trainer.data.row_store import batch_rows, write_rows
from trainer.data.row_texts import TextRows
from trainer.data.rows_manifest import SPLITS, RowRecipe, RowsManifest, RowSplitFacts
from trainer.data.tokenizer import load_tokenizer, save_tokenizer, use_worker_threads
from trainer.files.atomic_files import write_atomically
from trainer.files.checked_json import dump_checked

if TYPE_CHECKING:
    import pyarrow as pa


def prepare_rows(config: DataConfig, folder: Path, stages: StageProgress) -> None:
    """Read the rows of a configuration, and write them with their manifest last.

    Args:
        config: the section ``data``.
        folder: where to; empty.
        stages: shows progress.

    Raises:
        UserError: the source cannot be read, a row or a label is not what it should be, or a split is empty.
        OSError: nothing can be written.
    """
    use_worker_threads(config.num_workers)
    kind = row_kind(config)
    with RowSpool(folder) as spool:
        num_rows = _read_rows(config, kind, spool, stages)
        spool.divide(config)
        training = spool.rows_of("train")
        with stages.stage("learning from the training rows", len(training)) as advance:
            recipe = learn_labels(spool, config, _empty_recipe(config))
            recipe = kind.learn(spool.payloads(training), recipe)
            advance(len(training))
        _write_rows(kind, spool, recipe, folder, stages, num_rows)


def prepare_by_recipe(
    config: DataConfig,
    recipe: RowRecipe,
    tokenizer_dir: Path | None,
    trained: bytes,
    folder: Path,
    stages: StageProgress,
) -> None:
    """Read rows by a recipe that was learnt from others, and write them as the split ``test``.

    Args:
        config: the section ``data``, with the source of these rows; how it divides rows does not count.
        recipe: how they are read.
        tokenizer_dir: folder of the recipe's tokenizer, if it has one.
        trained: keys of the rows that were trained on, which are dropped; empty where they are not known.
        folder: where to; empty.
        stages: shows progress.

    Raises:
        UserError: the source cannot be read or has no row, or a row or a label is not what it should be.
        OSError: nothing can be written.
    """
    use_worker_threads(config.num_workers)
    kind = row_kind(config, recipe)
    if isinstance(kind, TextRows):
        assert tokenizer_dir is not None, "a recipe of texts has one"
        kind.use(load_tokenizer(str(tokenizer_dir), packs=False))
    others = {"validation_paths": (), "test_paths": (), "hub_validation_split": None, "hub_test_split": None}
    whole = config.model_copy(update={**others, "split": SplitConfig()})
    with RowSpool(folder) as spool:
        num_rows = _read_rows(whole, kind, spool, stages)
        spool.put_all_into("test", trained)
        check_labels(spool, ("test",), config, recipe)
        _write_rows(kind, spool, recipe, folder, stages, num_rows)


def _write_rows(
    kind: RowKind, spool: RowSpool, recipe: RowRecipe, folder: Path, stages: StageProgress, num_rows: tuple[int, int]
) -> None:
    """Write all splits, and the manifest last; ``num_rows`` is ``_read_rows``'."""
    splits = {split: _write_split(kind, spool, split, recipe, folder, stages) for split in SPLITS}
    if isinstance(kind, TextRows):
        assert kind.tokenizer is not None, "it was learnt or named"
        save_tokenizer(kind.tokenizer, folder / TOKENIZER_FOLDER)
    tokenizer_files = sorted(path for path in (folder / TOKENIZER_FOLDER).rglob("*") if path.is_file())
    manifest = RowsManifest(
        preparation_version=ROWS_VERSION,
        recipe=recipe,
        python_version=platform.python_version(),
        num_rows_read=num_rows[0],
        num_empty=num_rows[1],
        num_dropped=kind.counts.num_dropped,
        num_filled=kind.counts.num_filled,
        tokenizer_files=[describe_file(path, folder) for path in tokenizer_files],
        splits=splits,
    )
    write_atomically(folder / MANIFEST_NAME, dump_checked(manifest.model_dump(mode="json")))


def _read_rows(config: DataConfig, kind: RowKind, spool: RowSpool, stages: StageProgress) -> tuple[int, int]:
    """Read all rows; returns how many there are, and how many of these are empty."""
    num_read = num_empty = 0
    with stages.stage("reading rows") as advance:
        for split, part in _parts(config):
            for row in read_raw_rows(part):
                num_read += 1
                advance(1)
                num_dropped = kind.counts.num_dropped
                payload = kind.payload(row)
                if payload is None:
                    num_empty += kind.counts.num_dropped == num_dropped
                    continue
                group = None if config.split.group is None else group_of(row, config.split.group)
                # The same few values come again and again in a table, but a text or an image that does has leaked.
                is_table = config.source == "table"
                spool.add(payload, label_of(row, config), row.source_id, group, split, with_label=is_table)
    return num_read, num_empty


def _write_split(
    kind: RowKind, spool: RowSpool, split: str, recipe: RowRecipe, folder: Path, stages: StageProgress
) -> RowSplitFacts:
    num_truncated = kind.counts.num_truncated
    rows_of_batch = batch_rows(spool.num_rows, spool.num_bytes)
    rows = spool.rows_of(split)
    with stages.stage(f"writing {split}", len(rows)) as advance:
        batches = _batches(kind, spool, rows, recipe, rows_of_batch)
        labels = json.dumps([spool.labels[row] for row in rows]).encode()
        facts = write_rows(folder, split, batches, rows_of_batch, spool.keys(rows), labels)
        advance(facts.num_rows)
    return facts.model_copy(
        update={
            "num_leaked": spool.num_leaked[split],
            "num_truncated": kind.counts.num_truncated - num_truncated,
        }
    )


def check_first_row(config: DataConfig) -> None:
    """Read the first row of a source, with its label.

    Raises:
        UserError: there is none, or it is not what it should be.
    """
    row = next(read_raw_rows(config), None)
    if row is None:
        raise UserError(f"data.source={config.source}: there is no row in it; check data.paths.")
    row_kind(config).payload(row)
    label_of(row, config)
    if config.split.group is not None:
        group_of(row, config.split.group)


def row_kind(config: DataConfig, recipe: RowRecipe | None = None) -> RowKind:
    """What is done with the rows of a source, whose columns are those of a recipe where there is one."""
    if config.source == "table":
        if recipe is not None:
            return TableRows(config, recipe.features, [column.name for column in recipe.categories])
        return TableRows.by_first_rows(config, read_raw_rows(config))
    if config.source in ("digits", "images"):
        return ImageRows(config)
    if config.source in ("audio", "tones"):
        return AudioRows(config, 0 if recipe is None else recipe.sampling_rate or 0)
    return TextRows(config)


def describe_rows(rows: PreparedRows) -> str:
    """What became of the rows, in a few lines."""
    manifest, recipe = rows.manifest, rows.recipe
    dropped = [f"{manifest.num_empty:,} empty"]
    if manifest.num_dropped:
        dropped.append(f"{manifest.num_dropped:,} without a number")
    lines = [f"rows        {manifest.num_rows_read:,} read, {' and '.join(dropped)} dropped"]
    for name, split in manifest.splits.items():
        leaked = f", {split.num_leaked:,} dropped that another split has as well" if split.num_leaked else ""
        cut = f", {split.num_truncated:,} cut to the longest that is read" if split.num_truncated else ""
        lines.append(f"{name:<11} {split.num_rows:,} rows{leaked}{cut}")
    if manifest.num_filled:
        lines.append(f"missing     {manifest.num_filled:,} numbers, with the training rows' mean in their place")
    if recipe.classes:
        counts = ", ".join(f"{name} {n:,}" for name, n in zip(recipe.classes[:20], recipe.class_counts, strict=False))
        lines.append(f"classes     {len(recipe.classes)} in training: {counts}")
    if recipe.label_mean is not None:
        lines.append(f"labels      mean {recipe.label_mean:.6g}, standard deviation {recipe.label_scale:.6g}")
    if rows.tokenizer_dir is not None:
        lines.append(f"tokenizer   {rows.vocab_size:,} tokens, {rows.tokenizer_dir}")
    lines.append(f"folder      {rows.folder}")
    return "\n".join(lines)


def _parts(config: DataConfig) -> Iterator[tuple[str | None, DataConfig]]:
    """What rows are read from, and the split that they belong to where they are named for one."""
    yield None, config
    for split in ("validation", "test"):
        if paths := getattr(config, f"{split}_paths"):
            yield split, config.model_copy(update={"paths": paths})
        if name := getattr(config, f"hub_{split}_split"):
            yield split, config.model_copy(update={"hub_split": name})


def _empty_recipe(config: DataConfig) -> RowRecipe:
    kinds = {"table": "table", "digits": "image", "images": "image", "audio": "audio", "tones": "audio"}
    return RowRecipe.model_validate({"kind": kinds.get(config.source, "text"), "label_kind": config.label_kind})


def _batches(
    kind: RowKind, spool: RowSpool, rows: list[int], recipe: RowRecipe, rows_of_batch: int
) -> "Iterator[pa.RecordBatch]":
    import pyarrow as pa

    payloads = spool.payloads(rows)
    for start in range(0, len(rows), rows_of_batch):
        chosen = rows[start : start + rows_of_batch]
        columns = kind.columns(list(itertools.islice(payloads, rows_of_batch)), recipe)
        columns["labels"] = label_column([spool.labels[row] for row in chosen], recipe, columns)
        columns.pop("word_starts", None)
        columns["source_id"] = pa.array([spool.source_ids[row] for row in chosen])
        yield pa.RecordBatch.from_pydict(columns)
