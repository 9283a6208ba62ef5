"""Configuration of the corpus, its preparation and the samples cut from it."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from sharding.ranks.errors import UserError
from sharding.strict_model import UNSET, OnlyWith, StrictModel
from trainer.config.rows import RowSettings

CONVERSATIONS = "stdlib-conversations"
"""The embedded source of conversations."""

# First global sample position, and the one after the last.
SampleRange = tuple[int, int]
"""First global sample position, and the one after the last."""

# One path may stand without a list.
Paths = Annotated[
    tuple[str, ...],
    BeforeValidator(lambda paths: (paths,) if isinstance(paths, str) else paths),
    Field(strict=False),
]


class SourceConfig(StrictModel):
    """Where documents come from."""

    source: Literal[
        "python-stdlib",
        "text",
        "jsonl",
        "parquet",
        "csv",
        "hub",
        "tokens",
        "digits",
        "table",
        "images",
        "audio",
        "tones",
        "factory",
        "stdlib-conversations",
    ] = "python-stdlib"
    """Kind of source: the embedded `python-stdlib`, local `text` (a file is a document), `jsonl`, `parquet` or `csv`
    files, a data set of the `hub`, or `tokens` that a tokenizer has made before; for rows also scikit-learn's `digits`,
    a `table`, folders of `images` or `audio`, each named after a class, and `tones` of four instruments, which are
    computed; the `factory` of your own that makes samples; or `stdlib-conversations`, questions about the functions of
    the standard library that its docstrings and signatures answer."""

    format: Literal["auto", "packed", "messages", "rows"] = "auto"
    """Whether samples are `packed` tokens of texts or of conversations (`messages`), or `rows`; `auto` is what the task
    by its name reads, packed for a task of your own, conversations of `stdlib-conversations`, and in `evaluation.sets`
    what the run is trained on. A source of a mixture has texts or conversations."""

    paths: Annotated[
        Paths, OnlyWith(source=("text", "jsonl", "parquet", "csv", "tokens", "table", "images", "audio"))
    ] = ()
    """Files, folders or glob patterns of a local source, also compressed (gzip, zstd, bzip2, xz); of a folder, files
    are read whose names end in `.txt` or `.md`, in `.jsonl`, `.ndjson` or `.json`, in `.parquet`, or in `.csv` or
    `.tsv`; of `tokens` in `.parquet`, or in `.bin` with Megatron's `.idx` beside it."""

    hub_name: Annotated[str | None, OnlyWith(source="hub")] = None
    """Name of the data set under `hub`, as `datasets.load_dataset` takes it."""

    hub_config: Annotated[str | None, OnlyWith(source="hub")] = None
    """Configuration name of the hub data set, where it has several."""

    hub_split: Annotated[str, OnlyWith(source="hub")] = "train"
    """Split of the hub data set that becomes the corpus."""

    text_field: Annotated[str, OnlyWith(source=("jsonl", "parquet", "csv", "hub"))] = "text"
    """Column that holds a document's text in `jsonl`, `parquet`, `csv` and `hub` sources."""

    messages_field: Annotated[str, OnlyWith(source=("jsonl", "parquet", "hub"))] = "messages"
    """Column that holds a conversation under format `messages`: a list of messages with `role` and `content`; functions
    that may be called are in the column `tools`, if there is one."""

    tokens_field: Annotated[str, OnlyWith(source="tokens")] = "input_ids"
    """Column that holds a document's token ids in Parquet files."""

    max_documents: Annotated[int, OnlyWith({"data.streaming": False}, because="a stream is read to its end")] = Field(
        default=0, ge=0
    )
    """Use only this many documents, taken in source order; 0 means all."""

    @property
    def reads_messages(self) -> bool:
        """Whether its documents are conversations."""
        return self.format == "messages" or self.source == CONVERSATIONS


class MixtureSource(SourceConfig):
    """One source of a mixture: where its documents come from, and its share of the training samples."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the source in logs and in `shardline data show`; letters, digits, `.`, `_` and `-`."""

    weight: float = Field(gt=0.0)
    """Share of the training samples that come from this source, relative to the weights of the others."""


TEXT_SOURCES = ("python-stdlib", "text", "jsonl", "parquet", "csv", "hub", CONVERSATIONS, "tokens")
"""Sources that become tokens."""
MESSAGES_SOURCES = ("jsonl", "parquet", "hub", CONVERSATIONS)
"""Sources that may have conversations."""

_TOKENS = OnlyWith(source=TEXT_SOURCES, because="there are no tokens elsewhere")
_TEXTS = OnlyWith(format=("auto", "packed"), because="conversations and rows are prepared before training")
_PACKED = OnlyWith(format=("auto", "packed", "messages"), because="a row is a sample of its own")


class DataConfig(RowSettings, SourceConfig):
    """Where samples come from: packed tokens that are cut from text, or rows."""

    factory: Annotated[str | None, OnlyWith(source="factory")] = None
    """`module:function` of your own that is called with `arguments` and returns samples, as
    `trainer/data/samples.py` describes them."""

    arguments: Annotated[dict[str, Any], OnlyWith(source="factory")] = {}
    """Arguments of the function that factory names."""

    folder: Annotated[str | None, OnlyWith(source="factory")] = None
    """Folder of the module of a factory; where it is not given, that of the configuration file if the module lies
    there."""

    mixture: Annotated[
        tuple[MixtureSource, ...],
        Field(strict=False),
        OnlyWith(
            streaming=False,
            because="a source's place is computed from its number of samples, which a stream does not have",
        ),
        OnlyWith(format=("auto", "packed"), because="each source says itself whether it has conversations"),
    ] = ()
    """Several sources with weights, each with the settings of a source, instead of the one that the keys above name."""

    streaming: Annotated[bool, _TEXTS] = False
    """Read, tokenise and pack the source while training instead of preparing it, for corpora too large for that."""

    sample_documents: Annotated[int, OnlyWith(streaming=True)] = Field(default=10_000, ge=1)
    """Documents at the beginning of a streamed source that `train-bpe` is trained on and the held-out ones are from."""

    shuffle_window: Annotated[int, OnlyWith(streaming=True)] = Field(default=1024, ge=1)
    """Samples of a rank's stream that are shuffled among themselves; a continued run packs as many again."""

    normalize: Annotated[Literal["none", "NFC", "NFKC"], OnlyWith(source=TEXT_SOURCES[:-1])] = "NFC"
    """Unicode normal form applied to each document; line ends become `\\n` unless `none`."""

    validation_fraction: Annotated[float, OnlyWith(validation_paths=UNSET, hub_validation_split=UNSET)] = Field(
        default=0.02, ge=0.0, lt=1.0
    )
    """Share of documents or rows, chosen by a hash of their contents, that is held out for evaluation."""

    tokenizer: Annotated[str, _TOKENS] = "train-bpe"
    """A `transformers` tokenizer name or folder, or `train-bpe` for a byte-level BPE trained on the corpus; if not set,
    that of `model.pretrained`, and a named one must have its ids."""

    vocab_size: Annotated[int, _TOKENS] = Field(default=8192, ge=257)
    """Number of tokens of a trained byte-level BPE; unused with any other tokenizer."""

    mask_token: Annotated[bool, _TOKENS] = False
    """Have a token that hides others: a trained BPE gets `[MASK]` and, to fill up rows, `[PAD]`; any other tokenizer
    must have one. If not set, true under task `masked-lm`."""

    chat_template: str | None = None
    """How conversations become text: `chatml`, `plain` (roles in words, for any tokenizer), or a file with a Jinja
    template; if not set, the tokenizer's own."""

    sequence_length: Annotated[
        int, OnlyWith(source=(*TEXT_SOURCES, "factory"), because="there are no tokens elsewhere")
    ] = Field(default=256, ge=1)
    """Tokens in one training sample; of a row that is a text, the most; of a factory's samples what their facts say."""

    shuffle: bool = True
    """Visit samples in a keyed random order, new in each epoch; false is corpus order."""

    skip_samples: Annotated[
        tuple[Annotated[SampleRange, Field(strict=False)], ...],
        Field(strict=False),
        OnlyWith(
            streaming=False,
            because="a stream's samples have no positions that could be jumped over without reading them",
        ),
    ] = ()
    """Ranges of global sample positions, `[[first, end], ...]` with the end not included, that training skips."""

    document_mask: Annotated[bool, _PACKED] = False
    """Keep the documents of a sample apart: attention stays within each, positions count from its start, and its
    first token is not a target. If not set, true for conversations."""

    packing: Literal["auto", "stream", "whole"] = "auto"
    """Whether documents are packed one behind the other and cut where a sample ends (`stream`), or conversations
    `whole`, as many into a sample as fit; `auto` is whole for conversations and stream for texts."""

    shard_tokens: Annotated[int, _PACKED] = Field(default=64 * 1024 * 1024, ge=1024)
    """Tokens in one packed shard file."""

    num_workers: int = Field(default=0, ge=0)
    """Threads that tokenise: in preparation, where 0 means one per usable core, and of each rank that streams, where
    0 means one."""

    cache_dir: str | None = None
    """Folder of prepared corpora and trained tokenizers; `$SHARDLINE_CACHE` or `~/.cache/shardline` if not set."""

    @property
    def has_rows(self) -> bool:
        """Whether samples are rows, and not packed tokens."""
        return self.format == "rows"

    @property
    def has_messages(self) -> bool:
        """Whether there are conversations, in a mixture perhaps beside texts."""
        return not self.has_rows and any(source.reads_messages for source in self.mixture or (self,))

    @property
    def packs_whole(self) -> bool:
        """Whether a conversation is never cut to fill a sample up."""
        return self.has_messages and self.packing != "stream"

    @property
    def has_tokens(self) -> bool:
        """Whether samples are of tokens, packed or each a row."""
        return self.source in TEXT_SOURCES

    @property
    def unit(self) -> str:
        """What training counts in its rates: tokens, or samples where there are none."""
        return "samples" if self.has_rows and not self.has_tokens else "tokens"


def validate_data(data: DataConfig) -> None:
    """Every rule among the settings under ``data``.

    Raises:
        UserError: a rule is broken.
    """
    if data.mixture:
        _validate_mixture(data)
    elif data.source == "factory":
        _validate_factory(data)
    else:
        validate_source(data, "data")
    has_tokens = any(source.source == "tokens" for source in data.mixture or (data,))
    if has_tokens and (data.tokenizer == "train-bpe" or data.streaming):
        setting, remedy = (
            ("data.tokenizer=train-bpe", "name the tokenizer that has made them")
            if data.tokenizer == "train-bpe"
            else ("data.streaming=true", "set it to false")
        )
        raise UserError(f"data.source=tokens has tokens and no text, which {setting} needs; {remedy}.")
    for first, end in data.skip_samples:
        if not 0 <= first < end:
            raise UserError(
                f"data.skip_samples: [{first}, {end}] is no range: the first number is a position from 0, and the "
                "second the position after the last sample that is skipped; raise it above the first."
            )


_OF_A_FACTORY = {"source", "factory", "arguments", "folder", "sequence_length", "shuffle", "skip_samples", "cache_dir"}


def _validate_factory(data: DataConfig) -> None:
    if data.factory is None or not all(data.factory.partition(":")):
        raise UserError(
            f"data.source=factory needs data.factory, which is {data.factory}; name a module:function, such as "
            "my_samples:make_samples."
        )
    defaults = DataConfig()
    for name in DataConfig.model_fields:
        if name not in _OF_A_FACTORY and getattr(data, name) != getattr(defaults, name):
            raise UserError(
                f"data.{name}={getattr(data, name)} has no effect under data.source=factory, whose function makes the "
                "samples; remove it, or let the function have it by data.arguments."
            )


def _validate_mixture(data: DataConfig) -> None:
    defaults = SourceConfig()
    changed = [name for name in SourceConfig.model_fields if getattr(data, name) != getattr(defaults, name)]
    # Of a mixture as of one source it says what samples are; that they are no rows is said beside the setting.
    if data.format in ("packed", "rows"):
        changed.remove("format")
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
        validate_source(source, f"data.mixture {source.name}")


def validate_source(settings: SourceConfig, key: str) -> None:
    """Check that a source has what its kind needs.

    Args:
        settings: the source.
        key: what to call it.

    Raises:
        UserError: it has not.
    """
    source = settings.source
    if source == "factory":
        raise UserError(f"{key}.source=factory: samples of your own are all that a run reads; set data.source to it.")
    if source in ("text", "jsonl", "parquet", "csv", "tokens", "images", "audio") and not settings.paths:
        raise UserError(f"{key}.source={source} needs {key}.paths, which is empty; list the files.")
    if source == "hub" and settings.hub_name is None:
        raise UserError(f"{key}.source=hub needs {key}.hub_name, which is not set; name the data set.")
