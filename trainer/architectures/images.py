"""The size of images in a configuration of `transformers`."""

from typing import TYPE_CHECKING, Any

from sharding.ranks.errors import UserError
from trainer.config.sections import ModelConfig

if TYPE_CHECKING:
    from transformers import PretrainedConfig

ImageShape = tuple[int, int, int]
"""Channels, height and width."""


def fields_for_images(shape: ImageShape, defaults: "PretrainedConfig") -> dict[str, Any]:
    """Fields of an image model's configuration that follow from the images, as far as its class has them."""
    channels, height, width = shape
    values = {"num_channels": channels, "image_size": height if height == width else [height, width]}
    return {name: value for name, value in values.items() if hasattr(defaults, name)}


def check_images(model: ModelConfig, config: "PretrainedConfig", shape: ImageShape) -> None:
    """Refuse a model that takes other images, or would leave a border of them unread.

    Raises:
        UserError: it does.
    """
    channels, height, width = shape
    name = model.name
    images = f"{channels} x {height} x {width} images"
    their_channels, their_sizes = getattr(config, "num_channels", channels), _pair(getattr(config, "image_size", None))
    if (their_channels, their_sizes or (height, width)) != (channels, (height, width)):
        theirs = " x ".join(map(str, (their_channels, *(their_sizes or ("any", "any")))))
        raise UserError(
            f"{name} takes {theirs} images, but the samples are {images} (channels, height, width); set "
            "data.image_size and data.image_channels to the model's, or remove these fields of model.config."
        )
    patch = _pair(getattr(config, "patch_size", None))
    if patch is not None and their_sizes is not None and (height % patch[0] or width % patch[1]):
        raise UserError(
            f"{name} cuts images into patches of {patch[0]} x {patch[1]}, which do not divide {images} (channels, "
            "height, width); set model.config.patch_size or data.image_size so that they do."
        )


def _pair(size: Any) -> tuple[int, int] | None:
    """A height and a width; None for what is neither one number nor two."""
    if isinstance(size, int):
        return size, size
    return (size[0], size[1]) if isinstance(size, list | tuple) and len(size) == 2 else None
