"""Samples of whatever is prepared, packed tokens or rows."""

from trainer.config.data import DataConfig
from trainer.data.facts import SampleFacts
from trainer.data.packed import packed_samples, sample_facts
from trainer.data.prepared import Prepared
from trainer.data.prepared_own import PreparedOwn
from trainer.data.prepared_rows import PreparedRows
from trainer.data.row_samples import RowSamples
from trainer.data.samples import Samples


def prepared_samples(prepared: Prepared, data: DataConfig, *, verify: bool = True) -> Samples:
    """The samples of what is prepared; of a streamed source those of its beginning.

    Args:
        prepared: a corpus, a mixture, rows, or samples of the user's own.
        data: the section ``data``.
        verify: compare what is read with what was prepared.
    """
    if isinstance(prepared, PreparedRows):
        return RowSamples(prepared, verify=verify)
    if isinstance(prepared, PreparedOwn):
        return prepared.samples()
    return packed_samples(prepared, data, verify=verify)


def prepared_facts(prepared: Prepared, data: DataConfig) -> SampleFacts:
    """What is known of the samples of what is prepared, before any is read."""
    if isinstance(prepared, PreparedRows | PreparedOwn):
        return prepared.facts()
    return sample_facts(prepared, data)
