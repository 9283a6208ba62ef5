"""Preparation: from documents to packed shards, once, whoever asks and however often it is killed."""

import itertools
import os
import platform
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from sharding.ranks.errors import UserError
from trainer.config.data import DataConfig, SourceConfig
from trainer.data.chat_template import CHATML_TOKENS, ChatTemplate, load_chat_template
from trainer.data.clean import CleanedCorpus, clean_corpus
from trainer.data.corpus import read_documents
from trainer.data.files import check_readable, find_files, name_endings, name_some
from trainer.data.identity import (
    PREPARATION_VERSION,
    corpus_folder,
    errors_of,
    folder_by_recipe,
    named_sources,
    prepared_part,
)
from trainer.data.pack import describe_file, pack_split, write_file
from trainer.data.pack_conversations import CONVERSATION_DTYPE, pack_conversations
from trainer.data.prepare_rows import describe_rows, prepare_by_recipe, prepare_rows
from trainer.data.prepared import (
    MANIFEST_NAME,
    TOKENIZER_FOLDER,
    CorpusManifest,
    Prepared,
    PreparedCorpus,
    PreparedTokens,
    find_prepared,
    open_prepared,
)
from trainer.data.prepared_own import PreparedOwn, prepare_own
from trainer.data.prepared_rows import PreparedRows
from trainer.data.progress import StageProgress
from trainer.data.rows_manifest import SPLITS, RowRecipe
from trainer.data.tokenizer import (
    TRAINED,
    load_tokenizer,
    save_tokenizer,
    tokenizer_fingerprint,
    train_byte_level_bpe,
    use_worker_threads,
    vocabulary_size,
)
from trainer.files.atomic_files import write_atomically
from trainer.files.checked_json import dump_checked
from trainer.files.locks import exclusive

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def prepare_corpus(config: DataConfig, *, progress: bool = True, fingerprint: str | None = None) -> PreparedTokens:
    """The prepared corpus or mixture of a configuration whose samples are packed tokens; see ``prepare_samples``.

    Raises:
        UserError: its samples are rows, or see ``prepare_samples``.
    """
    if config.has_rows:
        raise UserError(
            "data.format=rows: this reads packed tokens, but the task of the configuration reads rows; name a "
            "configuration of a language model."
        )
    prepared = prepare_samples(config, progress=progress, fingerprint=fingerprint)
    assert isinstance(prepared, PreparedTokens), "its samples are packed tokens"
    return prepared


def prepare_samples(config: DataConfig, *, progress: bool = True, fingerprint: str | None = None) -> Prepared:
    """The prepared corpus, mixture or rows of a configuration, made now if need be.

    Several processes may ask at once: one works, the others wait for it. Work goes to a folder of its own that is
    renamed when it is whole, so a process that is killed leaves nothing that could be taken for a corpus.

    Args:
        config: the corpus.
        progress: whether this process shows a person how it goes.
        fingerprint: of the tokens that a run is trained on, see ``find_prepared``.

    Raises:
        UserError: the source cannot be read or is empty, the tokenizer cannot be had, or there is no space.
    """
    if config.source == "factory":
        # What was written down says nothing of what the function makes now.
        return prepare_own(config, corpus_folder(config))
    found = find_prepared(config, fingerprint)
    if found is not None:
        return found
    folder = corpus_folder(config)

    def make(work: Path, stages: StageProgress) -> None:
        part = prepared_part(config)
        (prepare_rows if config.has_rows else _prepare_corpora)(part, work, stages)

    return _made_once(folder, lambda: open_prepared(folder, config), make, progress)


def prepare_rows_by(
    recipe: RowRecipe,
    config: DataConfig,
    tokenizer_dir: Path | None,
    *,
    trained: PreparedRows | None = None,
    progress: bool = True,
) -> PreparedRows:
    """Rows that are read as those were that a model was trained on, all of them in the split ``test``.

    Args:
        recipe: how rows are read, of a run's prepared rows or of a checkpoint.
        config: the section ``data`` of that run, with the source of these rows.
        tokenizer_dir: folder of the recipe's tokenizer, if it has one.
        trained: the rows that the model is trained on, where they are there: those that are among them are dropped.
        progress: whether this process shows a person how it goes.

    Raises:
        UserError: the source cannot be read, a row is not what it should be, or there is no space.
    """
    folder = folder_by_recipe(config, recipe, "" if trained is None else trained.fingerprint)

    def make(work: Path, stages: StageProgress) -> None:
        keys = b"" if trained is None else trained.trained_keys()
        prepare_by_recipe(config, recipe, tokenizer_dir, keys, work, stages)

    return _made_once(
        folder, lambda: PreparedRows(folder) if (folder / MANIFEST_NAME).exists() else None, make, progress
    )


Found = TypeVar("Found", bound=Prepared)


def _made_once(
    folder: Path,
    find: Callable[[], Found | None],
    make: Callable[[Path, StageProgress], None],
    progress: bool,
) -> Found:
    """What is prepared in a folder, made now if need be; whoever comes meanwhile waits."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with exclusive(folder.with_suffix(".lock"), on_wait=_say_that_it_waits if progress else lambda: None):
            found = find()
            if found is None:
                _prepare(folder, make, progress)
                found = find()
    except OSError as error:
        # Sources are read elsewhere: whatever comes here is of the place that is written to.
        reason = error.strerror or str(error)
        raise UserError(
            f"the corpus cannot be prepared in {folder.parent}: {reason}; free some space (or quota) there, or set "
            "data.cache_dir to another folder."
        ) from None
    assert found is not None, "what was prepared can be opened"
    return found


def _prepare(folder: Path, make: Callable[[Path, StageProgress], None], progress: bool) -> None:
    for leftover in folder.parent.glob(f"{folder.name}.partial-*"):
        # We hold the lock, so whoever made it is gone.
        shutil.rmtree(leftover)
    work = folder.parent / f"{folder.name}.partial-{os.getpid()}"
    work.mkdir()
    try:
        with StageProgress(progress) as stages:
            make(work, stages)
        # Without a manifest it is no corpus, and a mixture without a folder is none.
        shutil.rmtree(folder, ignore_errors=True)
        work.rename(folder)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise


def _prepare_corpora(config: DataConfig, work: Path, stages: StageProgress) -> None:
    """Clean, tokenise and pack all sources of a configuration."""
    use_worker_threads(config.num_workers)
    # What is cheap to check comes before hours of reading.
    is_trained = config.tokenizer == TRAINED
    named = None if is_trained else load_tokenizer(config.tokenizer, masks=config.mask_token)
    template = None if named is None else _chat_template(config, named)
    if named is not None and config.vocab_size != DataConfig.model_fields["vocab_size"].default:
        stages.note(
            f"data.vocab_size={config.vocab_size} has no effect: data.tokenizer={config.tokenizer} has "
            f"{len(named):,} tokens of its own"
        )
    for name, source in named_sources(config):
        with errors_of(name):
            _check_source(source, stages)
    cleaned = {}
    for name, source in named_sources(config):
        (work / name).mkdir(exist_ok=True)
        with errors_of(name):
            cleaned[name] = clean_corpus(source, config, work / name, stages)
        if empty := cleaned[name].empty_files:
            stages.note(f"data.paths: {len(empty):,} files have nothing in them: {name_some(empty)}")
    tokenizer = named or _train_tokenizer(config, list(cleaned.values()), stages)
    template = template or _chat_template(config, tokenizer)
    for name, corpus in cleaned.items():
        with errors_of(name):
            _write_corpus(config, corpus, tokenizer, template, work / name, stages)


def _chat_template(config: DataConfig, tokenizer: "PreTrainedTokenizerFast") -> ChatTemplate | None:
    """What writes the conversations of a configuration, if it has any; the tokenizer keeps it."""
    return load_chat_template(tokenizer, config.chat_template, config.tokenizer) if config.has_messages else None


def _check_source(source: SourceConfig, stages: StageProgress) -> None:
    """Check that all files of a source can be read, and its first row; say which files are passed over."""
    if source.paths:
        found = find_files(source)
        check_readable(found.files)
        if found.passed_over:
            stages.note(
                f"data.paths: {len(found.passed_over):,} files of folders are passed over, since data.source="
                f"{source.source} reads {name_endings(source.source)} there: {name_some(found.passed_over)}"
            )
    next(read_documents(source), None)


def _write_corpus(
    config: DataConfig,
    cleaned: CleanedCorpus,
    tokenizer: "PreTrainedTokenizerFast",
    template: ChatTemplate | None,
    work: Path,
    stages: StageProgress,
) -> None:
    """Pack one source, with a copy of the tokenizer and with the manifest last."""
    save_tokenizer(tokenizer, work / TOKENIZER_FOLDER)
    vocab_size = vocabulary_size(tokenizer)
    dtype = "<u2" if vocab_size <= 1 << 16 else "<u4"
    conversations = None
    if cleaned.has_messages:
        assert template is not None, "a configuration with conversations has a template"
        dtype = CONVERSATION_DTYPE
        splits, conversations = pack_conversations(config, cleaned, tokenizer, template, work, stages)
    else:
        splits = {
            name: pack_split(name, cleaned, tokenizer, dtype, config.shard_tokens, work, stages)
            for name in ("train", "validation")
        }
    cleaned.remove_spool()
    for name, facts in splits.items():
        keys = write_file(work / f"{name}-keys.bin", cleaned.keys_of(name))
        splits[name] = facts.model_copy(update={"keys": keys})
    manifest = CorpusManifest(
        preparation_version=PREPARATION_VERSION,
        dtype=dtype,
        vocab_size=vocab_size,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        mask_token_id=tokenizer.mask_token_id,
        tokenizer_sha256=tokenizer_fingerprint(tokenizer),
        corpus_sha256=cleaned.sha256,
        python_version=platform.python_version(),
        num_documents_read=cleaned.num_read,
        num_empty=cleaned.num_empty,
        num_duplicates=cleaned.num_duplicates,
        validation_limit=cleaned.validation_limit,
        conversations=conversations,
        tokenizer_files=[
            describe_file(path, work) for path in sorted((work / TOKENIZER_FOLDER).rglob("*")) if path.is_file()
        ],
        splits=splits,
    )
    # Of texts it is what it was before there were conversations.
    without = set() if cleaned.has_messages else {"conversations"}
    write_atomically(work / MANIFEST_NAME, dump_checked(manifest.model_dump(mode="json", exclude=without)))


def _train_tokenizer(
    config: DataConfig, cleaned: list[CleanedCorpus], stages: StageProgress
) -> "PreTrainedTokenizerFast":
    num_documents = sum(corpus.num_documents("train") for corpus in cleaned)
    with stages.stage("training the tokenizer", num_documents) as advance:
        texts = itertools.chain.from_iterable(corpus.texts("train") for corpus in cleaned)
        controls = CHATML_TOKENS if config.has_messages and config.chat_template == "chatml" else ()
        return train_byte_level_bpe(
            _counted(texts, advance), config.vocab_size, masks=config.mask_token, controls=controls
        )


def _counted(texts: Iterator[str], advance: Callable[[int], None]) -> Iterator[str]:
    for text in texts:
        yield text
        advance(1)


def _say_that_it_waits() -> None:
    print("another process is preparing this corpus; waiting for it", flush=True)


def describe_corpus(corpus: Prepared) -> str:
    """What became of the documents or rows, in a few lines."""
    if isinstance(corpus, PreparedRows):
        return describe_rows(corpus)
    if isinstance(corpus, PreparedOwn):
        counts = [f"{split:<11} {corpus.num_samples(split):,} samples" for split in SPLITS]
        identity = f"samples     fingerprint {corpus.fingerprint[:16]}"
        return "\n".join([*counts, identity, f"folder      {corpus.folder}"])
    lines = []
    for part in corpus.corpora:
        manifest = part.manifest
        if part.name:
            lines.append(f"source      {part.name}")
        lines.append(
            f"documents   {manifest.num_documents_read:,} read, {manifest.num_empty:,} empty and "
            f"{manifest.num_duplicates:,} duplicates dropped"
        )
        for name, split in manifest.splits.items():
            lines.append(f"{name:<11} {split.num_documents:,} documents, {split.num_tokens:,} tokens")
            if manifest.conversations is not None:
                lines[-1] += f", {manifest.conversations.num_targets[name]:,} targets"
            if split.unigram_entropy is not None:
                lines[-1] += f", {split.unigram_entropy:.4f} nats of unigram entropy"
        if (talk := manifest.conversations) is not None:
            lines.append(
                f"of these     {talk.num_cut:,} conversations cut, {talk.num_divided:,} divided; "
                f"{talk.num_without_target:,} without a target dropped"
            )
        lines.append(f"corpus      SHA-256 {manifest.corpus_sha256[:16]}, Python {manifest.python_version}")
    lines.append(f"tokenizer   {corpus.vocab_size:,} tokens, {corpus.tokenizer_dir}")
    lines.append(f"folder      {corpus.folder}")
    return "\n".join(lines)


__all__ = ["PreparedCorpus", "describe_corpus", "find_prepared", "prepare_corpus", "prepare_samples"]
