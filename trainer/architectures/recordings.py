"""The sampling rate of recordings that a stored model has learnt."""

from pathlib import Path

from sharding.ranks.errors import UserError
from trainer.config.sections import ModelConfig
from trainer.data.rows_manifest import RECIPE_NAME, RowRecipe


def check_sampling_rate(model: ModelConfig, sampling_rate: int) -> None:
    """Refuse a pretrained model that has learnt recordings of another rate, as far as its folder says it.

    Raises:
        UserError: it has; to such a model all that it hears is slower or faster than it is.
    """
    theirs = None if model.pretrained is None else _stored_rate(model.pretrained)
    if theirs not in (None, sampling_rate):
        raise UserError(
            f"model.pretrained={model.pretrained} has learnt recordings of {theirs} samples a second, but those of the "
            f"run have {sampling_rate}; bring them to its rate."
        )


def _stored_rate(name: str) -> int | None:
    """Samples in a second, of an export of ours or of what goes with a model of transformers."""
    from transformers.feature_extraction_utils import FeatureExtractionMixin

    recipe = Path(name).expanduser() / RECIPE_NAME
    try:
        if recipe.exists():
            return RowRecipe.model_validate_json(recipe.read_text()).sampling_rate
        rate = FeatureExtractionMixin.get_feature_extractor_dict(name)[0].get("sampling_rate")
    except (OSError, ValueError):
        # It does not say.
        return None
    return rate if isinstance(rate, int) else None
