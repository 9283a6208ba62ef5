"""Rules that span several settings of the data."""

from sharding.errors import UserError
from trainer.data.config import DataConfig, SourceConfig


def validate_data(data: DataConfig) -> None:
    """Every rule among the settings under ``data``.

    Raises:
        UserError: a rule is broken.
    """
    if data.mixture:
        _validate_mixture(data)
    else:
        _validate_source(data, "data")
    for first, end in data.skip_samples:
        if not 0 <= first < end:
            raise UserError(
                f"data.skip_samples: [{first}, {end}] is no range: the first number is a position from 0, and the "
                "second the position after the last sample that is left out; raise it above the first."
            )
    _validate_streaming(data)


def _validate_mixture(data: DataConfig) -> None:
    defaults = SourceConfig()
    changed = [name for name in SourceConfig.model_fields if getattr(data, name) != getattr(defaults, name)]
    if changed:
        raise UserError(
            f"data.{changed[0]} has no effect beside data.mixture, whose sources have settings of their own; "
            "move it into one of them, or remove it."
        )
    names = [source.name for source in data.mixture]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"data.mixture has {names.count(name)} sources named {name}; give each its own name.")
    for source in data.mixture:
        _validate_source(source, f"data.mixture {source.name}")


def _validate_streaming(data: DataConfig) -> None:
    if not data.streaming:
        for name in ("sample_documents", "shuffle_window"):
            if getattr(data, name) != DataConfig.model_fields[name].default:
                raise UserError(f"data.{name} has an effect under data.streaming=true only; set that, or remove it.")
        return
    if data.mixture:
        raise UserError(
            "data.mixture cannot be streamed: a source's place in a mixture is computed from its number of sequences, "
            "which a stream does not have; set data.streaming to false, or name one source."
        )
    if data.skip_samples:
        raise UserError(
            "data.skip_samples has no meaning under data.streaming=true: a stream's samples have no positions that "
            "could be jumped over without reading them; remove it, or set data.streaming to false."
        )
    if data.max_documents:
        raise UserError(
            f"data.max_documents={data.max_documents} has no meaning under data.streaming=true, which reads the "
            "source to its end; remove it."
        )


def _validate_source(settings: SourceConfig, key: str) -> None:
    source = settings.source
    if source in ("text", "jsonl", "parquet") and not settings.paths:
        raise UserError(f"{key}.source={source} needs {key}.paths, which is empty; list the files.")
    if source in ("python-stdlib", "hub") and settings.paths:
        raise UserError(
            f"{key}.paths is set, but {key}.source={source} reads no files; "
            f"set {key}.source to text, jsonl or parquet, or remove {key}.paths."
        )
    if (source == "hub") != (settings.hub_name is not None):
        raise UserError(f"{key}.source={source} and {key}.hub_name={settings.hub_name}: hub needs a name, others none.")
