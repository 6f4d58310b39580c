"""Pictures as users have them, and as networks take them."""

from __future__ import annotations

from typing import Any

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
from torch import Tensor

MODES = {1: "L", 3: "RGB", 4: "RGBA"}
DEEP_MODES = ("I", "F")  # and "I;16" and its like: what is white in them, they do not say


def read_images(
    image: Any, channels: int, height: int | None = None, width: int | None = None, check_range: bool = True
) -> Tensor:
    """Images as a float32 tensor of shape `(batch, channels, height, width)`, in which white is 1.

    Args:
        image (`PIL.Image.Image`, `np.ndarray`, `Tensor`, or a list of them): arrays have the shape
            `(batch, height, width, channels)`, tensors `(batch, channels, height, width)`, both with fewer dimensions
            where there is one of a kind. Numbers lie in [0, 1], or are bytes. Pictures take the model's mode.
        channels (`int`): of the model.
        height, width (`int`, *optional*): what they are resized to; their own size when `None`.
        check_range (`bool`): refuse numbers outside of [0, 1].

    Raises:
        `ValueError`, `TypeError`: for another number of channels, values out of range, images of several sizes where
            none is wanted, or what is no image.
    """
    images = join("image", to_tensors("image", image, channels), height, width)
    if images.shape[1] != channels:
        raise ValueError(f"`image` must have {channels} channels, got {images.shape[1]}.")
    if check_range:
        _check_range("image", images)
    return images


def read_masks(mask_image: Any, height: int | None = None, width: int | None = None) -> Tensor:
    """Masks as booleans of shape `(batch, 1, height, width)`: true above 1/2.

    Args:
        mask_image: like `image` of [`read_images`], of one channel; whole numbers may be 0 and 1, too.
        height, width (`int`, *optional*): what they are resized to, without values in between.

    Raises:
        `ValueError`, `TypeError`: as in [`read_images`], and for pictures that are transparent in part.
    """
    masks = join("mask_image", to_tensors("mask_image", mask_image, 1, is_mask=True), height, width, "nearest-exact")
    if masks.shape[1] != 1:
        raise ValueError(f"`mask_image` must have one channel, got {masks.shape[1]}.")
    _check_range("mask_image", masks)
    return masks > 0.5


def to_tensors(name: str, given: Any, channels: int | None = None, is_mask: bool = False) -> list[Tensor]:
    """Each of the images given, or all that are one array, as float32 tensors of shape `(n, channels, height, width)`.

    Args:
        name (`str`): of the argument, for errors.
        given: see [`read_images`].
        channels (`int`, *optional*): that pictures are brought to; grey ones have one and others three when `None`.
        is_mask (`bool`): whole numbers may be 0 and 1, and pictures may not be transparent.
    """
    if isinstance(given, list | tuple):
        if not given:
            raise ValueError(f"`{name}` is an empty list.")
        return [tensor for one in given for tensor in to_tensors(name, one, channels, is_mask)]
    if isinstance(given, PIL.Image.Image):
        if is_mask and "A" in given.getbands() and np.asarray(given.getchannel("A")).min() < 255:
            raise ValueError(f"`{name}` is transparent in part, which says nothing: make it black and white.")
        given = np.asarray(_in_mode(name, given, channels))
    if isinstance(given, np.ndarray):
        found = torch.from_numpy(np.array(given))
        if found.ndim == 2:
            found = found[..., None]
        found = found.movedim(-1, -3)
    elif isinstance(given, Tensor):
        found = given if given.ndim > 2 else given[None]
    else:
        raise TypeError(f"`{name}` has an unknown format: {type(given).__name__}. Pass pictures, arrays or tensors.")
    found = found[None] if found.ndim == 3 else found
    if found.ndim != 4 or not found.numel():
        raise ValueError(f"`{name}` of shape {tuple(given.shape)} holds no images.")
    return [_as_float(name, found, is_mask)]


def join(
    name: str, images: list[Tensor], height: int | None = None, width: int | None = None, mode: str = "bicubic"
) -> Tensor:
    """One tensor of several, resized where a size is wanted.

    Raises:
        `ValueError`: if they differ in size and none is wanted, or in channels.
    """
    if height is not None and width is not None:
        images = [_resized(image, height, width, mode) for image in images]
    shapes = {tuple(image.shape[1:]) for image in images}
    if len(shapes) > 1:
        raise ValueError(f"`{name}` holds images of several shapes: {sorted(shapes)}.")
    return torch.cat(images)


def check_sizes(images: list[Tensor], masks: list[Tensor]) -> None:
    """See that each mask has the size of its image.

    Args:
        images, masks (`list[Tensor]`): as [`to_tensors`] gives them.

    Raises:
        `ValueError`: if one has not.
    """
    sizes, mask_sizes = _sizes_of(images), _sizes_of(masks)
    count = max(len(sizes), len(mask_sizes))
    pairs = zip(sizes * (count // len(sizes)), mask_sizes * (count // len(mask_sizes)), strict=False)
    for one, other in pairs:
        if one != other:
            raise ValueError(
                f"`image` and `mask_image` must have one size, got {one[0]} x {one[1]} and {other[0]} x {other[1]}."
            )


def as_batch(images: Tensor, batch_size: int, name: str) -> Tensor:
    """One for all, or one for each, as one for each.

    Raises:
        `ValueError`: for another number of them.
    """
    if len(images) not in (1, batch_size):
        raise ValueError(f"Got {len(images)} for `{name}`, need one or {batch_size}, the number of results.")
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
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
        raise ValueError(f"`{name}` must be an integer of at least {least}, got {value!r}.")
    return int(value)


def _as_float(name: str, values: Tensor, is_mask: bool) -> Tensor:
    if values.dtype == torch.bool or values.is_floating_point():
        return values.float()
    if is_mask and values.max() <= 1:
        return values.float()
    if values.dtype != torch.uint8:
        raise TypeError(f"`{name}` must be of floating point numbers or bytes, got {values.dtype}.")
    return values.float() / 255


def _in_mode(name: str, picture: PIL.Image.Image, channels: int | None) -> PIL.Image.Image:
    """A picture in the model's mode: of colours for a model of colours, and grey for others."""
    if picture.mode.startswith(DEEP_MODES):
        raise ValueError(f"`{name}` is a picture of mode {picture.mode!r}: pass it as an array with values in [0, 1].")
    if channels is None:
        channels = 1 if picture.mode in ("1", "L", "LA") else 3
    return picture.convert(MODES.get(channels, picture.mode))


def _resized(images: Tensor, height: int, width: int, mode: str) -> Tensor:
    if images.shape[-2:] == (height, width):
        return images
    if mode != "bicubic":
        return F.interpolate(images, (height, width), mode=mode)
    low, high = images.amin(), images.amax()  # which cubic kernels overshoot
    return F.interpolate(images, (height, width), mode=mode, antialias=True).clamp(low, high)


def _check_range(name: str, images: Tensor) -> None:
    low, high = float(images.min()), float(images.max())
    if not (low >= 0 and high <= 1):
        raise ValueError(f"`{name}` must have values in [0, 1], got [{low:g}, {high:g}].")


def _sizes_of(images: list[Tensor]) -> list[tuple[int, int]]:
    """Height and width of each image."""
    return [(part.shape[-2], part.shape[-1]) for part in images for _ in part]
