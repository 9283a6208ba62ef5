"""What is prepared: a folder with a manifest, found without loading any heavy library."""

import contextlib
import hashlib
import json
from pathlib import Path

from sharding.ranks.errors import UserError
from trainer.config import RunConfig
from trainer.config.data import DataConfig
from trainer.data.corpus import all_files
from trainer.data.corpus_manifest import CorpusManifest
from trainer.data.identity import corpus_folder, prepared_root, source_kind
from trainer.data.mixture import MixtureOrder, WeightedInterleaving, integer_shares
from trainer.data.order import SampleOrder
from trainer.data.prepared_folder import MANIFEST_NAME, TOKENIZER_FOLDER, open_manifest
from trainer.data.prepared_own import PreparedOwn, open_own
from trainer.data.prepared_rows import PreparedRows
from trainer.data.shards import StreamUnion, TokenStream, hash_files


class PreparedCorpus:
    """Tokens, documents and tokenizer of a corpus."""

    def __init__(self, folder: Path, name: str = "") -> None:
        """Open a prepared corpus.

        Args:
            folder: where it is.
            name: what a mixture calls it.

        Raises:
            UserError: the manifest or the tokenizer is corrupt, or a file has another size than the manifest says.
        """
        self.folder = folder
        self.name = name
        self.manifest = open_manifest(folder, CorpusManifest)

    @property
    def vocab_size(self) -> int:
        """Tokens of the tokenizer."""
        return self.manifest.vocab_size

    @property
    def eos_token_id(self) -> int:
        """Token that ends each document."""
        return self.manifest.eos_token_id

    @property
    def corpora(self) -> list["PreparedCorpus"]:
        """The sources, here one."""
        return [self]

    @property
    def tokenizer_dir(self) -> Path:
        """Folder that `AutoTokenizer.from_pretrained` loads."""
        return self.folder / TOKENIZER_FOLDER

    @property
    def fingerprint(self) -> str:
        """Identity of the tokens: equal for equal corpora, wherever and whenever they were prepared."""
        shards = {name: [shard.sha256 for shard in split.shards] for name, split in self.manifest.splits.items()}
        identity = json.dumps([self.manifest.tokenizer_sha256, shards], sort_keys=True)
        return hashlib.sha256(identity.encode()).hexdigest()

    def check_sequence_length(self, sequence_length: int) -> None:
        """Assert that there is at least one whole training sample.

        Raises:
            UserError: the training split is shorter.
        """
        num_tokens = self.manifest.splits["train"].num_tokens
        conversations = self.manifest.conversations
        if conversations is not None and conversations.row_tokens is not None:
            # They were packed into samples of this length, filled up.
            return
        if num_tokens <= sequence_length:
            which = f"that of {self.name}" if self.name else "this one"
            raise UserError(
                f"data.sequence_length={sequence_length} needs a training split of at least {sequence_length + 1} "
                f"tokens, but {which} has {num_tokens}; lower it, add documents, or lower data.validation_fraction."
            )

    def stream(self, split: str, *, verify: bool = True) -> TokenStream:
        """The tokens of ``train`` or ``validation``; ``verify`` is TokenStream's."""
        manifest, has_targets = self.manifest, self.manifest.conversations is not None
        return TokenStream(
            self.folder, manifest.splits[split], manifest.dtype, self.name, verify=verify, has_targets=has_targets
        )

    def order(self, seed: int, data: DataConfig) -> SampleOrder:
        """The order in which training visits the samples."""
        return SampleOrder(seed, self.stream("train").num_samples(data.sequence_length), data.shuffle)

    def trained_keys(self) -> bytes | None:
        """Keys of the training documents, by which they are known elsewhere; None in an old corpus.

        Raises:
            UserError: they have changed.
        """
        keys = self.manifest.splits["train"].keys
        if keys is None:
            return None
        hash_files(self.folder, [keys])
        return (self.folder / keys.file).read_bytes()

    def verify(self) -> None:
        """Compare the contents of every file with the manifest.

        Raises:
            UserError: a file has changed.
        """
        for split in self.manifest.splits.values():
            hash_files(self.folder, split.files)


class PreparedMixture:
    """Several prepared corpora with one tokenizer; the weights belong to the run and not to what is prepared."""

    def __init__(self, folder: Path, config: DataConfig) -> None:
        """Open the corpora of a mixture.

        Raises:
            UserError: see PreparedCorpus.
        """
        self.folder = folder
        self.corpora = [PreparedCorpus(folder / source.name, source.name) for source in config.mixture]
        shares = integer_shares([source.weight for source in config.mixture])
        self.interleaving = WeightedInterleaving([corpus.name for corpus in self.corpora], shares)

    @property
    def vocab_size(self) -> int:
        """Tokens of the tokenizer."""
        return self.corpora[0].vocab_size

    @property
    def eos_token_id(self) -> int:
        """Token that ends each document."""
        return self.corpora[0].eos_token_id

    @property
    def tokenizer_dir(self) -> Path:
        """Folder that `AutoTokenizer.from_pretrained` loads."""
        return self.corpora[0].tokenizer_dir

    @property
    def fingerprint(self) -> str:
        """Identity of the tokens of all sources and of their weights."""
        shares = zip(self.corpora, self.interleaving.shares, strict=True)
        identity = sorted([corpus.name, share, corpus.fingerprint] for corpus, share in shares)
        return hashlib.sha256(json.dumps(identity).encode()).hexdigest()

    def check_sequence_length(self, sequence_length: int) -> None:
        """Assert that each source has at least one whole training sample.

        Raises:
            UserError: one is shorter.
        """
        for corpus in self.corpora:
            corpus.check_sequence_length(sequence_length)

    def stream(self, split: str, *, verify: bool = True) -> StreamUnion:
        """The tokens of ``train`` or ``validation`` of all sources, one source behind the other."""
        return StreamUnion([corpus.stream(split, verify=verify) for corpus in self.corpora])

    def order(self, seed: int, data: DataConfig) -> MixtureOrder:
        """The order in which training visits the samples of all sources."""
        sizes = [corpus.stream("train").num_samples(data.sequence_length) for corpus in self.corpora]
        return MixtureOrder(seed, self.interleaving, sizes, data.shuffle)

    def verify(self) -> None:
        """Compare the contents of every file with the manifests.

        Raises:
            UserError: a file has changed.
        """
        for corpus in self.corpora:
            corpus.verify()


class PreparedStream(PreparedCorpus):
    """The prepared beginning of a streamed source, for its tokenizer and held-out documents."""

    def __init__(self, folder: Path, config: DataConfig) -> None:
        """Open it.

        Raises:
            UserError: see PreparedCorpus.
        """
        super().__init__(folder)
        self._config = config

    @property
    def validation_limit(self) -> float:
        """The stream's documents below it are held out, like those of the beginning."""
        limit = self.manifest.validation_limit
        return self._config.validation_fraction if limit is None else limit

    @property
    def fingerprint(self) -> str:
        """Identity of the stream: of its beginning, and of all settings that a position in it depends on.

        Contents beyond the beginning are not read for it; of local files the names and sizes count.
        """
        config = self._config
        settings = config.model_dump(
            mode="json",
            include={"source", "hub_name", "hub_config", "hub_split", "text_field", "normalize"}
            | {"validation_fraction", "sequence_length", "shuffle", "shuffle_window"},
        )
        files = [] if config.source == "hub" else [(path.name, path.stat().st_size) for path in all_files(config)]
        identity = json.dumps([super().fingerprint, settings, files], sort_keys=True)
        return hashlib.sha256(identity.encode()).hexdigest()

    def check_sequence_length(self, sequence_length: int) -> None:
        """A stream has any number of samples; its beginning is not what is trained on."""


PreparedTokens = PreparedCorpus | PreparedMixture
"""What is prepared of packed tokens."""

Prepared = PreparedTokens | PreparedRows | PreparedOwn
"""What is prepared of any samples."""


def describe_mixture(corpus: Prepared, sequence_length: int, num_positions: int) -> list[str]:
    """For a mixture a line per source: its share, and how often training up to a position goes through it."""
    if not isinstance(corpus, PreparedMixture):
        return []
    total = sum(corpus.interleaving.shares)
    lines = []
    for part, share in zip(corpus.corpora, corpus.interleaving.shares, strict=True):
        num_samples = part.stream("train").num_samples(sequence_length)
        num_epochs = num_positions * share / total / num_samples
        lines.append(
            f"mixture: {part.name} {share / total:.4g} of the samples, {num_samples:,} in an epoch, "
            f"{num_epochs:.3g} epochs by the last step"
        )
    return lines


def describe_entropy(corpus: PreparedTokens) -> list[str]:
    """For each source the loss that knowing how frequent tokens are gives, without looking at any around them."""
    return [
        f"unigram entropy of {part.name or 'the training split'}: {entropy:.4f} nats per token"
        for part in corpus.corpora
        if (entropy := part.manifest.splits["train"].unigram_entropy) is not None
    ]


def find_prepared(config: DataConfig, fingerprint: str | None = None) -> Prepared | None:
    """What is prepared of a configuration, if anything. Imports neither torch nor datasets.

    Args:
        config: the corpus.
        fingerprint: of the tokens that a run is trained on. They are found wherever its sources are now, and whether
            these are there at all; where they are not found, what the sources are now decides.

    Raises:
        UserError: a source file is missing, or the prepared corpus is corrupt.
    """
    try:
        folder = corpus_folder(config)
    except UserError:
        found = None if fingerprint is None else _find_by_fingerprint(config, fingerprint)
        if found is None:
            raise
        return found
    present = open_prepared(folder, config)
    if config.source == "factory":
        return present
    if fingerprint is None or (present is not None and present.fingerprint == fingerprint):
        return present
    return _find_by_fingerprint(config, fingerprint) or present


def _find_by_fingerprint(config: DataConfig, fingerprint: str) -> Prepared | None:
    for folder in sorted(prepared_root(config).glob(f"{source_kind(config)}-*")):
        # What another run has corrupted is its own matter.
        with contextlib.suppress(UserError):
            prepared = open_prepared(folder, config) if folder.is_dir() else None
            if prepared is not None and prepared.fingerprint == fingerprint:
                return prepared
    return None


def is_of_present_source(corpus: Prepared, config: DataConfig) -> bool:
    """Whether a corpus was prepared of what the sources of a configuration are now."""
    try:
        return corpus_folder(config) == corpus.folder
    except UserError:
        return False


def open_prepared(folder: Path, config: DataConfig) -> Prepared | None:
    """What is prepared in a folder, if anything.

    Raises:
        UserError: it is corrupt.
    """
    if config.source == "factory":
        return open_own(folder, config)
    # A mixture's folder gets its name when all of its corpora are whole.
    if not (folder if config.mixture else folder / MANIFEST_NAME).exists():
        return None
    if config.has_rows:
        return PreparedRows(folder)
    if config.streaming:
        return PreparedStream(folder, config)
    return PreparedMixture(folder, config) if config.mixture else PreparedCorpus(folder)


def open_corpus(config: RunConfig, fingerprint: str | None) -> Prepared:
    """The corpus or rows that a run was trained on.

    Args:
        config: the run's.
        fingerprint: what its checkpoints say of the tokens; None where there is none.

    Raises:
        UserError: it is no longer there.
    """
    corpus = find_prepared(config.data, fingerprint)
    if corpus is None:
        raise UserError(
            "the run's prepared corpus is not there (data.cache_dir or $SHARDLINE_CACHE may have changed); "
            "prepare it again with `shardline data prepare`."
        )
    return corpus
