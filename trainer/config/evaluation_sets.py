"""Sets that a run is evaluated on beside its validation split: their rules, and each as a section ``data``."""

from typing import TYPE_CHECKING

from sharding.ranks.errors import UserError
from trainer.config.data import TEXT_SOURCES, DataConfig, SourceConfig, validate_source
from trainer.config.rows import SplitConfig

if TYPE_CHECKING:
    from trainer.config.schema import RunConfig
    from trainer.config.sections import EvaluationSet


def validate_sets(config: "RunConfig") -> None:
    """Every rule about ``evaluation.sets``.

    Raises:
        UserError: a rule is broken.
    """
    names = [one.name for one in config.evaluation.sets]
    taken = {source.name for source in config.data.mixture} if config.evaluation.by_source else set()
    for one in config.evaluation.sets:
        if names.count(one.name) > 1 or one.name in taken:
            what = "a source of data.mixture" if one.name in taken else "another one of them"
            raise UserError(f"evaluation.sets: {one.name} is the name of {what} too; give each its own name.")
        validate_source(one, f"evaluation.sets {one.name}")
        if one.source != config.data.source and not (one.source in TEXT_SOURCES and config.data.source in TEXT_SOURCES):
            raise UserError(
                f"evaluation.sets {one.name}: its source={one.source} has other samples than data.source="
                f"{config.data.source}, on which the run is trained; name a source of the same kind."
            )


def set_data(data: DataConfig, one: "EvaluationSet") -> DataConfig:
    """The section ``data`` of a run with a set in place of its source, all of which is one split."""
    source = {name: getattr(one, name) for name in SourceConfig.model_fields}
    if one.format == "auto":
        source["format"] = data.format
    whole = {"validation_fraction": 0.0, "validation_paths": (), "test_paths": (), "split": SplitConfig()}
    whole |= {"hub_validation_split": None, "hub_test_split": None}
    return data.model_copy(update=source | whole | {"mixture": (), "table": None})
