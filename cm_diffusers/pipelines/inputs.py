"""Pictures as users have them, and as networks take them."""

from __future__ import annotations

from typing import Any

import numpy as np
import PIL.Image
import torch
from diffusers.image_processor import VaeImageProcessor
from torch import Tensor

MODES = {1: "L", 3: "RGB", 4: "RGBA"}


def read_images(
    image: Any, channels: int, height: int | None = None, width: int | None = None, check_range: bool = True
) -> Tensor:
    """Images as a tensor of shape `(batch, channels, height, width)`, with values in [0, 1] if that is checked.

    Args:
        image (`PIL.Image.Image`, `np.ndarray`, `Tensor`, or a list of them): arrays have the shape
            `(batch, height, width, channels)`, tensors `(batch, channels, height, width)`, with values in [0, 1].
            Pictures change their mode, but neither arrays nor tensors.
        channels (`int`): of the model.
        height, width (`int`, *optional*): what they are resized to; their own size when `None`.

    Raises:
        `ValueError`: for another number of channels, values out of range, or what is no image.
    """
    images = _read(_in_mode(image, channels), height, width)
    if not images.numel():
        raise ValueError(f"`image` holds nothing: its shape is {tuple(images.shape)}.")
    if images.shape[1] != channels:
        raise ValueError(f"`image` must have {channels} channels, got {images.shape[1]}.")
    if check_range:
        _check_range("image", images)
    return images


def read_masks(mask_image: Any, height: int | None = None, width: int | None = None) -> Tensor:
    """Masks as booleans of shape `(batch, 1, height, width)`: true above 1/2.

    Args:
        mask_image (like `image` in [`read_images`], of one channel, or of booleans): values in [0, 1].
        height, width (`int`, *optional*): what they are resized to, without values in between.

    Raises:
        `ValueError`: for more channels, values out of range, or what is no image.
    """
    masks = _read(_as_float(_in_mode(mask_image, 1)), height, width, resample="nearest")
    if masks.shape[1] != 1:
        raise ValueError(f"`mask_image` must have one channel, got {masks.shape[1]}.")
    _check_range("mask_image", masks)
    return masks > 0.5


def as_batch(images: Tensor, batch_size: int, name: str) -> Tensor:
    """One for all, or one for each, as one for each.

    Raises:
        `ValueError`: for another number of them.
    """
    if len(images) not in (1, batch_size):
        raise ValueError(f"Got {len(images)} for `{name}`, need one or {batch_size}.")
    return images.expand(batch_size, *images.shape[1:])


def count_of(images: Tensor, batch_size: int | None) -> int:
    """How many results are wanted: `batch_size`, or as many as there are images.

    Raises:
        `ValueError`: for what is no number.
    """
    return len(images) if batch_size is None else check_count("batch_size", batch_size)


def check_count(name: str, value: Any, least: int = 1) -> int:
    """`value`, a number of something.

    Raises:
        `ValueError`: if it is no integer, or below the least.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"`{name}` must be an integer of at least {least}, got {value!r}.")
    return value


def size_of(image: Any) -> tuple[int, int]:
    """Height and width of an image, or of the first of several, in pixels."""
    if isinstance(image, list | tuple):
        return size_of(image[0])
    if isinstance(image, PIL.Image.Image):
        return image.height, image.width
    shape = tuple(image.shape)
    if isinstance(image, np.ndarray) and len(shape) > 2:
        return shape[-3], shape[-2]
    return shape[-2], shape[-1]


def _read(image: Any, height: int | None, width: int | None, resample: str = "lanczos") -> Tensor:
    processor = VaeImageProcessor(vae_scale_factor=1, do_normalize=False, resample=resample)
    images: Tensor = processor.preprocess(image, height, width)
    return images


def _check_range(name: str, images: Tensor) -> None:
    low, high = float(images.min()), float(images.max())
    if not (low >= 0 and high <= 1):
        raise ValueError(f"`{name}` must have values in [0, 1], got [{low:g}, {high:g}].")


def _as_float(mask: Any) -> Any:
    """Masks of booleans as numbers, which can be resized."""
    if isinstance(mask, list):
        return [_as_float(one) for one in mask]
    if isinstance(mask, np.ndarray) and mask.dtype == bool:
        return mask.astype(np.float32)
    return mask.float() if isinstance(mask, Tensor) and mask.dtype == torch.bool else mask


def _in_mode(image: Any, channels: int) -> Any:
    """PIL images in the model's mode: grey pictures for models of colour, and the other way round."""
    if isinstance(image, list):
        return [_in_mode(one, channels) for one in image]
    mode = MODES.get(channels)
    return image.convert(mode) if isinstance(image, PIL.Image.Image) and mode else image


def has_colour(image: Any) -> bool:
    """Whether an image, or the first of several, has more than one channel."""
    if isinstance(image, list | tuple):
        return has_colour(image[0])
    if isinstance(image, PIL.Image.Image):
        return len(image.getbands()) > 2 or image.mode == "P"
    if isinstance(image, np.ndarray):
        return image.ndim > 2 and image.shape[-1] != 1
    return image.ndim > 2 and image.shape[-3] != 1
