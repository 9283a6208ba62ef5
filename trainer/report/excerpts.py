"""Text to show in a report: what the model wrote, and a document it was evaluated on."""

from dataclasses import dataclass
from pathlib import Path

from sharding.ranks.errors import UserError
from trainer.checkpoint.trained_corpus import trained_fingerprints
from trainer.config import load_frozen_config
from trainer.config.stages import stages_of
from trainer.data.prepared import PreparedCorpus, PreparedTokens, find_prepared
from trainer.run_folder.folder import RunFolder

_MAX_CHARACTERS = 4000
_MAX_TOKENS = 1000


@dataclass(frozen=True)
class Excerpt:
    """A piece of text.

    Attributes:
        title: what it is.
        text: the text.
        is_cut: whether there is more of it than is shown.
    """

    title: str
    text: str
    is_cut: bool


def read_excerpts(run_dir: Path) -> list[Excerpt]:
    """A run's excerpts; those whose sources are gone are skipped."""
    return [excerpt for excerpt in (_generated(run_dir), _document(run_dir)) if excerpt is not None]


def _generated(run_dir: Path) -> Excerpt | None:
    try:
        with (run_dir / "sample.txt").open(errors="replace") as file:
            text = file.read(_MAX_CHARACTERS + 1)
    except OSError:
        return None
    return Excerpt("Written by the model", text[:_MAX_CHARACTERS], len(text) > _MAX_CHARACTERS)


def _document(run_dir: Path) -> Excerpt | None:
    """The beginning of the first held-out document, or of the first training document where none is held out."""
    try:
        config = load_frozen_config(run_dir / "config.yaml")
        fingerprints = trained_fingerprints(config, RunFolder(run_dir))
        first = stages_of(config)[0]
        prepared = find_prepared(first.config.data, fingerprints.get(first.name))
        if not isinstance(prepared, PreparedTokens):
            return None
        corpus = prepared.corpora[0]
        split = next(name for name in ("validation", "train") if corpus.manifest.splits[name].num_documents)
        return _first_document(corpus, split)
    except (UserError, OSError, KeyError, StopIteration):
        return None


def _first_document(corpus: PreparedCorpus, split: str) -> Excerpt | None:
    from tokenizers import Tokenizer

    path = corpus.tokenizer_dir / "tokenizer.json"
    if not path.exists():
        return None
    stream = corpus.stream(split)
    first = stream.documents_between(0, min(stream.num_tokens, _MAX_TOKENS))[0]
    text = Tokenizer.from_file(str(path)).decode(stream.read(0, first.stop).tolist(), skip_special_tokens=True)
    kind = "Held-out document" if split == "validation" else "Training document"
    is_cut = first.stop == _MAX_TOKENS or len(text) > _MAX_CHARACTERS
    return Excerpt(f"{kind}: {first.source_id}", text[:_MAX_CHARACTERS], is_cut)
