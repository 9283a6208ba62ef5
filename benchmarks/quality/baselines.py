"""What the examples are compared with: plain models of scikit-learn on the same rows, and counts of tokens."""

import warnings
from typing import Any

import numpy as np

from benchmarks.quality.cases import BaselineName
from trainer.config import RunConfig
from trainer.data.any_samples import prepared_samples
from trainer.data.prepare import prepare_samples
from trainer.data.samples import Samples

_ROWS_AT_ONCE = 1024


def measure_baseline(name: BaselineName, config: RunConfig, split: str) -> tuple[str, float]:
    """Train it on the run's own training samples, and score it on a split.

    Args:
        name: which.
        config: the run it stands beside.
        split: where it is scored.

    Returns:
        What it is, and its score.
    """
    corpus = prepare_samples(config.data, progress=False)
    samples = prepared_samples(corpus, config.data)
    if name == "unigram-entropy":
        return "entropy of single tokens, nats", _unigram_entropy(samples, split)
    train, held_out = _rows(samples, "train"), _rows(samples, split)
    if name == "tf-idf":
        return "TF-IDF and logistic regression, accuracy", _tf_idf(samples, train, held_out)
    return _linear(train, held_out)


def _linear(train: dict[str, np.ndarray], held_out: dict[str, np.ndarray]) -> tuple[str, float]:
    from sklearn.linear_model import LinearRegression, LogisticRegression

    inputs, others = (_flat(rows) for rows in (train, held_out))
    if np.issubdtype(train["labels"].dtype, np.integer):
        model: Any = LogisticRegression(max_iter=2000).fit(inputs, train["labels"])
        return "logistic regression, accuracy", float(model.score(others, held_out["labels"]))
    model = LinearRegression().fit(inputs, train["labels"])
    return "linear regression, R2", float(model.score(others, held_out["labels"]))


def _tf_idf(samples: Samples, train: dict[str, np.ndarray], held_out: dict[str, np.ndarray]) -> float:
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(samples.facts.tokenizer_dir, trust_remote_code=False)

    def texts(rows: dict[str, np.ndarray]) -> list[str]:
        # What the model sees of them, and no more.
        ids = zip(rows["input_ids"], rows["num_tokens"], strict=True)
        return [tokenizer.decode(row[:count], skip_special_tokens=True) for row, count in ids]

    words = TfidfVectorizer(sublinear_tf=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = make_pipeline(words, LogisticRegression(C=10, max_iter=1000)).fit(texts(train), train["labels"])
    return float(model.score(texts(held_out), held_out["labels"]))


def _unigram_entropy(samples: Samples, split: str) -> float:
    """Cross-entropy, in nats, of a split's tokens under the frequencies of the training tokens, each one added once."""
    num_tokens = samples.facts.vocab_size or 0
    trained = _counts(samples, "train", num_tokens) + 1
    held_out = _counts(samples, split, num_tokens)
    return float(-(held_out * np.log(trained / trained.sum())).sum() / held_out.sum())


def _counts(samples: Samples, split: str, vocab_size: int) -> np.ndarray:
    counts = np.zeros(vocab_size, dtype=np.int64)
    total = samples.num_samples(split)
    for first in range(0, total, _ROWS_AT_ONCE):
        rows = samples.read(split, range(first, min(first + _ROWS_AT_ONCE, total)))
        tokens = rows["tokens"][:, :-1].numpy()
        counts += np.bincount(tokens.reshape(-1), minlength=vocab_size)
    return counts


def _rows(samples: Samples, split: str) -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in samples.read(split, range(samples.num_samples(split))).items()}


def _flat(rows: dict[str, np.ndarray]) -> np.ndarray:
    """The columns of rows but their labels, side by side, [rows, inputs]."""
    columns = [rows[name].reshape(len(rows["labels"]), -1) for name in sorted(rows) if name != "labels"]
    return np.concatenate(columns, axis=1)
