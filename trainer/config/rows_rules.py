"""Which samples a run reads, and the rules that span the settings of rows; imports no torch."""

from typing import Any

from sharding.ranks.errors import UserError
from trainer.config.data import CONVERSATIONS, DataConfig
from trainer.config.rows import TASK_SAMPLES


def with_kind_of_samples(data: DataConfig, task_name: str) -> DataConfig:
    """The section ``data`` with what ``auto`` stands for under a task that reads rows.

    Whoever has this section alone then knows which kind it is.
    """
    kind, label_kind = TASK_SAMPLES.get(task_name, ("packed", "class"))
    if data.source == "factory":
        # Samples of one's own are what their maker says.
        return data
    changes: dict[str, Any] = {}
    if data.format == "auto" and kind == "rows":
        changes["format"] = "rows"
    elif data.format == "auto" and data.source == CONVERSATIONS:
        changes["format"] = "messages"
    if data.label_kind == "auto" and changes.get("format", data.format) == "rows":
        changes["label_kind"] = label_kind
    return data.model_copy(update=changes) if changes else data


def held_out_fraction(data: DataConfig) -> float:
    """Share of the rows that becomes the validation split; 0 where that is named."""
    return 0.0 if data.validation_paths or data.hub_validation_split else data.validation_fraction


def validate_rows(data: DataConfig, task_name: str) -> None:
    """Every rule about the kind of samples.

    Raises:
        UserError: a rule is broken.
    """
    if data.source == "factory":
        if TASK_SAMPLES.get(task_name, ("rows", ""))[0] == "packed":
            raise UserError(
                f"data.source=factory makes samples of your own, but task.name={task_name} reads packed tokens; give "
                "them as data.source=tokens, or name a task that reads rows, or one of your own."
            )
        return
    kind = "rows" if data.has_rows else "packed"
    needed, label_kind = TASK_SAMPLES.get(task_name, (kind, data.label_kind))
    if needed != kind:
        raise UserError(
            f"data.format={data.format}, but task.name={task_name} reads {needed} samples; remove data.format, or "
            "choose another task."
        )
    if data.has_rows:
        _validate_labels(data, task_name, label_kind)
        _validate_source(data)
    elif data.source in ("digits", "table", "images", "audio", "tones"):
        raise UserError(
            f"data.source={data.source} has rows, but task.name={task_name} reads packed tokens; choose a task that "
            "classifies or predicts numbers, or set data.format=rows for a task of your own."
        )


def _validate_labels(data: DataConfig, task_name: str, label_kind: str) -> None:
    if data.label_kind != label_kind:
        raise UserError(
            f"data.label_kind={data.label_kind}, but task.name={task_name} learns labels of kind {label_kind}; remove "
            "data.label_kind, or choose another task."
        )
    if data.label_kind == "tags" and data.source not in ("jsonl", "parquet", "hub"):
        raise UserError(
            f"data.label_kind=tags needs rows that hold lists, as those of jsonl, parquet and hub do, but data.source="
            f"{data.source}; choose one of these."
        )


def _validate_source(data: DataConfig) -> None:
    if data.source in ("tokens", CONVERSATIONS):
        raise UserError(
            f"data.source={data.source} has documents that are packed, and the task reads rows; name a source of texts."
        )
    if data.source == "table" and (data.table is None) == (not data.paths):
        raise UserError(
            f"data.source=table reads either data.table, which is {data.table}, or data.paths, of which there are "
            f"{len(data.paths)}; set exactly one of them."
        )
    if data.source == "images" and not data.image_size:
        raise UserError(
            "data.source=images needs data.image_size, the height and width that images are brought to; set it to 64, "
            "say."
        )
    named = [*data.features, *data.categories, data.label]
    for column in named:
        if data.source == "table" and named.count(column) > 1:
            raise UserError(
                f"data.features, data.categories and data.label: the column {column} is named twice; name it once."
            )
    fraction = held_out_fraction(data)
    if fraction + data.split.test_fraction >= 1:
        raise UserError(
            f"data.validation_fraction={fraction:g} + data.split.test_fraction={data.split.test_fraction:g} leaves "
            "nothing to train on; lower one of them."
        )
