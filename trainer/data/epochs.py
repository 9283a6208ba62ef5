"""How many samples an epoch has, which is known once the corpus is prepared. Imports no torch."""

from sharding.ranks.errors import UserError
from trainer.config import RunConfig
from trainer.config.rules import validate
from trainer.data.prepared import Prepared
from trainer.data.prepared_own import PreparedOwn
from trainer.data.prepared_rows import PreparedRows


def with_counted_epochs(config: RunConfig, corpus: Prepared) -> RunConfig:
    """A configuration whose number of steps is known; of a run by steps or tokens the same.

    An epoch is as many samples as the training split has, that of a mixture as many as all its sources have together.

    Raises:
        UserError: the configuration says another number, or breaks a rule now that its length is known.
    """
    if config.epochs is None:
        return config
    if isinstance(corpus, PreparedRows):
        num_samples = corpus.manifest.splits["train"].num_rows
    elif isinstance(corpus, PreparedOwn):
        num_samples = corpus.num_samples("train")
    else:
        num_samples = corpus.stream("train", verify=False).num_samples(config.data.sequence_length)
    if config.epoch_samples not in (None, num_samples):
        raise UserError(
            f"epoch_samples={config.epoch_samples}, but the training split has {num_samples} samples; remove it, for a "
            "run counts them itself."
        )
    counted = config.model_copy(update={"epoch_samples": num_samples})
    validate(counted)
    return counted
