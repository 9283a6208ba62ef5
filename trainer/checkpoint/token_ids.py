"""Whether token ids mean to weights that were trained elsewhere what they meant in that training."""

import tempfile
from pathlib import Path

from sharding.ranks.errors import UserError
from trainer.checkpoint.reader import CheckpointReader
from trainer.config import RunConfig
from trainer.data.tokenizer import TRAINED, first_difference, load_tokenizer


def check_named_tokenizer(config: RunConfig, prepared: Path | None = None) -> None:
    """Check the tokenizer of a run that begins with a pretrained model.

    Args:
        config: the run's.
        prepared: folder of the tokenizer that the corpus was prepared with; None before that, where the one that the
            configuration names is looked at.

    Raises:
        UserError: the pretrained model has no tokenizer of its own, or other ids than the one that is named.
    """
    pretrained, named = config.model.pretrained, config.data.tokenizer
    masks, packs = config.data.mask_token, not config.data.has_rows
    if pretrained is None or not config.data.has_tokens:
        return
    if named == pretrained:
        if prepared is None:
            load_tokenizer(pretrained, "the tokenizer of model.pretrained", masks=masks, packs=packs)
        return
    if named == TRAINED:
        raise UserError(
            f"data.tokenizer={TRAINED} makes new ids, which mean nothing to the weights of model.pretrained="
            f"{pretrained}; remove data.tokenizer to use the model's own, or name the one that it was trained with."
        )
    tokens = load_tokenizer(named if prepared is None else str(prepared), masks=masks, packs=packs).get_vocab()
    try:
        own = load_tokenizer(pretrained, masks=masks, packs=packs).get_vocab()
    except UserError:
        # Whoever names a tokenizer for a model that comes without one must know what it was trained with.
        return
    # Whose ids all mean what they did; what is beside them is new.
    only_adds = first_difference(own, tokens) is None and len(set(tokens.values())) == len(tokens)
    if only_adds and config.model.resize_vocabulary:
        return
    if difference := first_difference(tokens, own):
        remedy = ", or set model.resize_vocabulary=true, since it only adds tokens" if only_adds else ""
        raise UserError(
            f"data.tokenizer={named} does not have the token ids of model.pretrained={pretrained}, to whose weights "
            f"they would mean something else ({difference}); remove data.tokenizer to use the model's own{remedy}."
        )


def check_tokenizer_of_checkpoint(reader: CheckpointReader, prepared: Path) -> None:
    """Check the tokenizer of a corpus against that of another run's checkpoint, whose weights begin to train on it.

    Args:
        reader: the checkpoint; an old one has no tokenizer and is not compared.
        prepared: folder of the tokenizer that the corpus was prepared with.

    Raises:
        UserError: the ids differ, or the checkpoint is corrupt.
    """
    with tempfile.TemporaryDirectory(prefix="shardline-tokenizer-") as own:
        if not reader.unpack_tokenizer(Path(own)):
            return
        tokens, stored = (load_tokenizer(folder, packs=False).get_vocab() for folder in (str(prepared), own))
    difference = first_difference(tokens, stored)
    if difference is not None:
        raise UserError(
            f"the tokenizer of this run's corpus does not have the token ids of checkpoint {reader.folder}, to whose "
            f"weights they would mean something else ({difference}); write that run's tokenizer with `shardline "
            "export`, and name the folder as data.tokenizer."
        )
