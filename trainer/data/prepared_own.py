"""Samples that a function of the user's own makes: what is written down of them, and they themselves. No torch."""

import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import TypeAdapter, ValidationError

from sharding.ranks.errors import UserError
from trainer.config.data import DataConfig
from trainer.data.facts import SampleFacts
from trainer.data.order import SampleOrder
from trainer.data.prepared_folder import MANIFEST_NAME
from trainer.data.rows_manifest import SPLITS
from trainer.files.atomic_files import write_atomically
from trainer.runtime.own_modules import import_own

if TYPE_CHECKING:
    from trainer.data.samples import Samples


@dataclass(frozen=True)
class OwnRecord:
    """What is known of the samples without running the code that makes them.

    Attributes:
        fingerprint: identity of their contents.
        num_samples: samples of each split.
        facts: what is known of all of them.
    """

    fingerprint: str
    num_samples: dict[str, int]
    facts: SampleFacts


_RECORD = TypeAdapter(OwnRecord)


class PreparedOwn:
    """Samples of ``data.factory``, which every process that reads them makes itself."""

    def __init__(self, folder: Path, config: DataConfig, record: OwnRecord, samples: "Samples | None" = None) -> None:
        """Bind to what is known of them.

        Args:
            folder: where it is written down.
            config: the section ``data``.
            record: what is known.
            samples: they themselves, where they are made.
        """
        self.folder = folder
        self._config = config
        self._record = record
        self._samples = samples

    @property
    def fingerprint(self) -> str:
        """Identity of the samples, as their maker says it."""
        return self._record.fingerprint

    @property
    def tokenizer_dir(self) -> Path | None:
        """Folder that `AutoTokenizer.from_pretrained` loads, if there is one."""
        return self._record.facts.tokenizer_dir

    @property
    def vocab_size(self) -> int | None:
        """Tokens of the tokenizer, if there is one."""
        return self._record.facts.vocab_size

    @property
    def eos_token_id(self) -> int | None:
        """Token that ends each text, if there is one."""
        return self._record.facts.eos_token_id

    def facts(self) -> SampleFacts:
        """What is known of the samples."""
        return self._record.facts

    def num_samples(self, split: str) -> int:
        """Samples of a split."""
        return self._record.num_samples.get(split, 0)

    def samples(self) -> "Samples":
        """The samples; runs the user's function once.

        Raises:
            UserError: there is no such function, or it makes other samples than before.
        """
        if self._samples is None:
            samples = make_own(self._config)
            if _record_of(samples, self._config) != self._record:
                raise UserError(
                    f"data.factory={self._config.factory} makes other samples than those that {self.folder} was "
                    "written of; let it make the same at every call, or run shardline data prepare once more."
                )
            self._samples = samples
        return self._samples

    def check_sequence_length(self, sequence_length: int) -> None:
        """Assert that the run is told the length that the samples have, for the model's is counted by it.

        Raises:
            UserError: it is told another one.
        """
        length = self._record.facts.sequence_length
        if length is None and sequence_length != DataConfig().sequence_length:
            raise UserError(
                f"data.sequence_length={sequence_length} has no effect, since the facts of data.factory="
                f"{self._config.factory} have no sequence_length; remove it."
            )
        if length not in (None, sequence_length):
            raise UserError(
                f"data.sequence_length={sequence_length}, but the facts of data.factory={self._config.factory} say "
                f"that samples have {length} tokens at most; set it to that."
            )

    def order(self, seed: int, data: DataConfig) -> SampleOrder:
        """The order in which training visits the samples."""
        return SampleOrder(seed, self.num_samples("train"), data.shuffle)

    def verify(self) -> None:
        """Make the samples, and compare their fingerprint.

        Raises:
            UserError: see ``samples``.
        """
        self.samples()


def prepare_own(config: DataConfig, folder: Path) -> PreparedOwn:
    """Make samples, and write down what is known of them.

    Raises:
        UserError: there is no such function, it makes no samples, or there is no space.
    """
    samples = make_own(config)
    record = _record_of(samples, config)
    if _read(folder) != record:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_atomically(folder / MANIFEST_NAME, _RECORD.dump_json(record, indent=2))
        except OSError as error:
            raise UserError(
                f"{folder} cannot be written to: {error.strerror}; free some space (or quota) there, or set "
                "data.cache_dir to another folder."
            ) from None
    return PreparedOwn(folder, config, record, samples)


def open_own(folder: Path, config: DataConfig) -> PreparedOwn | None:
    """What was written down of samples, if anything; runs no code of the user's."""
    record = _read(folder)
    return None if record is None else PreparedOwn(folder, config, record)


def make_own(config: DataConfig) -> "Samples":
    """What ``data.factory`` makes of ``data.arguments``.

    Raises:
        UserError: there is no such function, it does not take these arguments, or it makes no samples.
    """
    name = str(config.factory)
    make = import_own(name, "data.factory", config.folder)
    try:
        inspect.signature(make).bind(**config.arguments)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"data.factory={name} cannot be called with data.arguments={config.arguments} ({error}); name "
            "its arguments there."
        ) from None
    # What goes wrong in its own code is shown with its traceback.
    samples: Samples = make(**config.arguments)
    lacking = [part for part in ("fingerprint", "facts", "num_samples", "read") if not hasattr(samples, part)]
    if lacking:
        raise UserError(
            f"data.factory={name} made {type(samples).__name__}, which has no {', '.join(lacking)}; return what "
            "trainer/data/samples.py calls Samples."
        )
    return samples


def _read(folder: Path) -> OwnRecord | None:
    try:
        return _RECORD.validate_json((folder / MANIFEST_NAME).read_bytes())
    except (OSError, ValidationError):
        return None


def _record_of(samples: "Samples", config: DataConfig) -> OwnRecord:
    """What is known of samples.

    Raises:
        UserError: they do not say it, or there are none to train on.
    """
    fingerprint, facts = samples.fingerprint, samples.facts
    counts = {split: samples.num_samples(split) for split in SPLITS}
    whole = all(isinstance(count, int) and count >= 0 for count in counts.values())
    if not (isinstance(fingerprint, str) and fingerprint and isinstance(facts, SampleFacts) and whole):
        raise UserError(
            f"data.factory={config.factory} made samples with fingerprint {fingerprint!r}, facts of "
            f"{type(facts).__name__} and {counts} samples; let these be a text that is not empty, a SampleFacts and "
            "numbers from 0."
        )
    if counts["train"] == 0:
        raise UserError(
            f"data.factory={config.factory} made {counts} samples, none to train on; let num_samples('train') be above "
            "0."
        )
    return OwnRecord(fingerprint=fingerprint, num_samples=counts, facts=facts)
