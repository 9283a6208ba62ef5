"""Rules of conversations: where they may come from, and what goes with them. Imports no torch."""

from typing import TYPE_CHECKING, Any

from sharding.ranks.errors import UserError
from trainer.config.data import MESSAGES_SOURCES, DataConfig, SourceConfig

if TYPE_CHECKING:
    from trainer.config.schema import RunConfig


def with_messages(data: DataConfig) -> DataConfig:
    """The section ``data`` with what is not set as conversations have it: the documents of a sample are kept apart."""
    if not data.has_messages or "document_mask" in data.model_fields_set:
        return data
    return data.model_copy(update={"document_mask": True})


def validate_messages(config: "RunConfig") -> None:
    """Every rule about conversations.

    Raises:
        UserError: a rule is broken.
    """
    data, task = config.data, config.task.name
    for source in data.mixture or (data,):
        name = getattr(source, "name", None)
        _validate_source(source, "data" if name is None else f"data.mixture {name}")
    for one in config.evaluation.sets:
        as_trained = one.model_copy(update={"format": "messages"}) if is_like_training(data, one) else one
        _validate_source(as_trained, f"evaluation.sets {one.name}")
        if as_trained.reads_messages and not data.has_messages:
            raise UserError(
                f"evaluation.sets {one.name}: it has conversations, but data has none, and they are evaluated by the "
                "chat template that is trained on; train on conversations too, or give the set as texts."
            )
    if not data.has_messages:
        settings: dict[str, Any] = {"data.chat_template": data.chat_template, "data.packing": data.packing}
        for key, value in settings.items():
            if value not in (None, "auto", "stream"):
                raise UserError(f"{key}={value} is for conversations, but data has none; remove it, or set "
                                "data.format=messages.")  # fmt: skip
        return
    if data.tokenizer == "train-bpe" and data.chat_template is None:
        raise UserError(
            "data.chat_template is not set, and a tokenizer that is trained (data.tokenizer=train-bpe) has none of its "
            "own; set it to chatml, plain or a file."
        )
    if task != "causal-lm" and ":" not in task:
        raise UserError(
            f"data.format=messages has conversations, of which task.name={task} can learn nothing; set "
            "task.name=causal-lm, or name a task of your own."
        )
    if data.packs_whole and not data.document_mask:
        raise UserError(
            "data.document_mask=false lets the conversations of a sample see one another; remove it, or set "
            "data.packing=stream, which cuts them where a sample ends."
        )


def is_like_training(data: DataConfig, one: SourceConfig) -> bool:
    """Whether a set has conversations because the run has, and says nothing else."""
    return one.format == "auto" and data.has_messages and not data.mixture


def _validate_source(source: SourceConfig, key: str) -> None:
    default = SourceConfig()
    if source.format == "rows" and key != "data":
        raise UserError(f"{key}.format=rows: whether samples are rows is said once, as data.format; remove it.")
    if not source.reads_messages:
        if source.messages_field != default.messages_field:
            raise UserError(
                f"{key}.messages_field={source.messages_field} is for conversations, but {key}.format={source.format}; "
                "remove it, or set format to messages."
            )
        return
    if source.source not in MESSAGES_SOURCES:
        raise UserError(
            f"{key}.source={source.source} has no conversations; set {key}.source to one of "
            f"{', '.join(MESSAGES_SOURCES)}, or remove {key}.format=messages."
        )
    if source.format == "packed":
        raise UserError(f"{key}.format=packed, but {key}.source={source.source} has conversations; remove the format.")
    if source.text_field != default.text_field:
        raise UserError(
            f"{key}.text_field={source.text_field} is for texts, but {key}.format=messages; remove it, or name the "
            f"column of conversations as {key}.messages_field."
        )
