"""Pictures as users have them, and as networks take them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sized
from typing import Any

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
from torch import Tensor

MODES = {1: "L", 3: "RGB", 4: "RGBA"}
DEEP_MODES = ("I", "F")  # and "I;16" and its like: what is white in them, they do not say
# Of a new pixel that no masked one lies in, the pixels within make up more than this, and its neighbours the rest.
LEAST_WEIGHT = 0.1


def read_images(
    image: Any, channels: int, height: int | None = None, width: int | None = None, check_range: bool = True
) -> Tensor:
    """Images as a float32 tensor of shape `(batch, channels, height, width)`, in which white is 1.

    Args:
        image (`PIL.Image.Image`, `np.ndarray`, `Tensor`, or a list of them): arrays have the shape
            `(batch, height, width, channels)`, tensors `(batch, channels, height, width)`, both with fewer dimensions
            where there is one of a kind. Numbers lie in [0, 1], or are bytes. Pictures take the model's mode, and
            transparency is laid on white unless it has that.
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
        height, width (`int`, *optional*): what they are resized to; a pixel is true that any true one lies in.

    Raises:
        `ValueError`, `TypeError`: as in [`read_images`], and for pictures that are transparent in part.
    """
    masks = [_as_mask(mask) for mask in to_tensors("mask_image", mask_image, 1, is_mask=True)]
    return join("mask_image", masks, height, width, _touched)


def unmasked(images: list[Tensor], masks: list[Tensor], height: int | None, width: int | None) -> list[Tensor]:
    """Images that are resized from the pixels that their masks leave: what is kept has nothing of what is repainted.

    Args:
        images, masks (`list[Tensor]`): each by itself, of one size in pairs; one for all, or one for each.
        height, width (`int`, *optional*): what they are resized to; as they are when `None`.
    """
    if height is None or width is None:
        return images
    pairs = _pairs(images, [~_as_mask(mask) for mask in masks])
    return [_resized_where(image, kept.to(image), height, width) for image, kept in pairs]


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
        if is_mask and _has_alpha(given) and np.asarray(given.convert("RGBA").getchannel("A")).min() < 255:
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
    name: str,
    images: list[Tensor],
    height: int | None = None,
    width: int | None = None,
    resize: Callable[[Tensor, int, int], Tensor] | None = None,
) -> Tensor:
    """One tensor of several, resized where a size is wanted.

    Raises:
        `ValueError`: if they differ in size and none is wanted, or in channels; for a height without a width.
    """
    if (height is None) != (width is None):
        raise ValueError("Pass both `height` and `width`, or none.")
    if height is not None and width is not None:
        images = [(resize or _resized)(image, height, width) for image in images]
    shapes = {tuple(image.shape[1:]) for image in images}
    if len(shapes) > 1:
        raise ValueError(f"`{name}` holds images of several shapes: {sorted(shapes)}.")
    return torch.cat(images)


def one_by_one(images: list[Tensor]) -> list[Tensor]:
    """Each image by itself, of those that [`to_tensors`] gives."""
    return [one for part in images for one in part.split(1)]


def check_sizes(images: list[Tensor], masks: list[Tensor]) -> None:
    """See that each mask has the size of its image.

    Args:
        images, masks (`list[Tensor]`): each by itself.

    Raises:
        `ValueError`: if one has not.
    """
    for image, mask in _pairs(images, masks):
        if (one := image.shape[-2:]) != (other := mask.shape[-2:]):
            raise ValueError(
                f"`image` and `mask_image` must have one size, got {one[0]} x {one[1]} and {other[0]} x {other[1]}."
            )


def as_batch(images: Tensor, batch_size: int, name: str) -> Tensor:
    """One for all, or one for each, as one for each.

    Raises:
        `ValueError`: for another number of them.
    """
    check_number(images, batch_size, name)
    return images.expand(batch_size, *images.shape[1:])


def check_number(images: Sized, batch_size: int, name: str) -> None:
    """See that there is one for all, or one for each.

    Raises:
        `ValueError`: if there is another number of them.
    """
    if len(images) not in (1, batch_size):
        raise ValueError(f"Got {len(images)} for `{name}`, need one or {batch_size}, the number of results.")


def count_of(images: Sized, batch_size: int | None) -> int:
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
    return to_mode(picture, channels)


def to_mode(picture: PIL.Image.Image, channels: int) -> PIL.Image.Image:
    """A picture in the mode of networks of so many channels; on white for those that have none for transparency."""
    if channels in (1, 3) and _has_alpha(picture):
        picture = PIL.Image.alpha_composite(PIL.Image.new("RGBA", picture.size, "white"), picture.convert("RGBA"))
    return picture.convert(MODES.get(channels, picture.mode))


def _has_alpha(picture: PIL.Image.Image) -> bool:
    """Whether a picture says how transparent it is: by a channel, or by a colour that stands for nothing."""
    return picture.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in picture.info


def _resized(images: Tensor, height: int, width: int) -> Tensor:
    if images.shape[-2:] == (height, width):
        return images
    low, high = (bound((1, 2, 3), keepdim=True) for bound in (images.amin, images.amax))  # cubic kernels overshoot
    return _bicubic(images, height, width).clamp(low, high)


def _resized_where(image: Tensor, kept: Tensor, height: int, width: int) -> Tensor:
    """An image resized from the pixels that are `kept`, where they are most of what a new pixel is made of."""
    plain = _resized(image, height, width)
    if image.shape[-2:] == (height, width) or not kept.any():
        return plain
    weight = _bicubic(kept, height, width)
    found = _bicubic(image * kept, height, width) / weight
    found = found.clamp(*(bound(image[kept.expand_as(image) > 0]) for bound in (torch.amin, torch.amax)))
    return torch.where(weight > LEAST_WEIGHT, found, plain)


def _bicubic(images: Tensor, height: int, width: int) -> Tensor:
    return F.interpolate(images, (height, width), mode="bicubic", antialias=True)


def _touched(masks: Tensor, height: int, width: int) -> Tensor:
    return masks if masks.shape[-2:] == (height, width) else F.adaptive_max_pool2d(masks.float(), (height, width)) > 0


def _as_mask(masks: Tensor) -> Tensor:
    """Where values of one channel are above 1/2."""
    if masks.shape[1] != 1:
        raise ValueError(f"`mask_image` must have one channel, got {masks.shape[1]}.")
    _check_range("mask_image", masks)
    return masks > 0.5


def _check_range(name: str, images: Tensor) -> None:
    low, high = float(images.min()), float(images.max())
    if not (low >= 0 and high <= 1):
        raise ValueError(f"`{name}` must have values in [0, 1], got [{low:g}, {high:g}].")


def _pairs(images: list[Tensor], masks: list[Tensor]) -> Iterable[tuple[Tensor, Tensor]]:
    """Each image with its mask, of which one may be for all."""
    count = max(len(images), len(masks))
    return zip(images * (count // len(images)), masks * (count // len(masks)), strict=False)
