"""One item of a dataset, whatever it is, as tensors that a network takes."""

from __future__ import annotations

import functools
import logging
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cm_diffusers.pipelines.inputs import MODES, to_mode
from cm_diffusers.training.captions import find_caption_column, read_captions

logger = logging.getLogger(__name__)

IMAGE_COLUMNS = ("images", "image", "img", "jpg", "jpeg", "png", "webp")
LABEL_COLUMNS = ("class_labels", "label", "labels")


@dataclass(frozen=True)
class ImageSpec:
    """The images a network takes.

    Args:
        channels (`int`): 1 (grey), 3 (RGB) or 4 (RGBA) for pictures; tensors may have any number.
        height, width (`int`): in pixels.
        value_range (`tuple[float, float]`): of the values.
        center_crop (`bool`): crop in the middle rather than at random.
        random_flip (`bool`): mirror half of the images.
    """

    channels: int
    height: int
    width: int
    value_range: tuple[float, float] = (-1.0, 1.0)
    center_crop: bool = True
    random_flip: bool = False

    def __post_init__(self) -> None:
        for name in ("channels", "height", "width"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        if not self.value_range[0] < self.value_range[1]:
            raise ValueError(f"`value_range` must be (low, high) with low < high, got {self.value_range}.")

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.channels, self.height, self.width


OVERSHOOT = 0.25  # of the range, which resampling may add to images
BYTES = 100  # what the brightest of images from 0 to 255 exceeds


def check_values(images: Tensor, spec: ImageSpec) -> None:
    """See that floats are in the network's range. It is told where they are not, or leave its lower half empty.

    Raises:
        `ValueError`: if they are bytes.
    """
    if not images.is_floating_point():
        return
    is_finite = images.isfinite()
    finite = images if is_finite.all() else images[is_finite]
    if not finite.numel():
        return
    (low, high), (least, most) = spec.value_range, (float(value) for value in finite.aminmax())
    found = f"The images' values go from {least:.4g} to {most:.4g}; the network's lie in [{low:g}, {high:g}]."
    slack = OVERSHOOT * (high - low)
    if least >= 0 and high < BYTES < most <= 255:
        raise ValueError(f"{found} Scale them to that.")
    if least < low - slack or most > high + slack:
        logger.warning("%s Samples are clipped to that.", found)
    elif low < 0 <= least < most:
        logger.warning("%s Is black %g?", found, low)


class BadImage(ValueError):
    """An image that cannot be read, or is not finite; the message names it. `on_bad_image="skip"` passes over it."""


def check_label(label: Any, num_classes: int | None, name: str) -> int:
    """`label`, which belongs to the item called `name`, as an `int`.

    Raises:
        `ValueError`: if it is not a whole number, or not in `[0, num_classes)`.
    """
    try:
        value = operator.index(label)
    except (TypeError, ValueError, RuntimeError):
        hint = " `dataset.class_encode_column` numbers a column of names." if isinstance(label, str) else ""
        raise ValueError(f"The label of {name} must be a whole number, got {label!r}.{hint}") from None
    if value < 0 or (num_classes is not None and value >= num_classes):
        known = "0 and more" if num_classes is None else f"0 to {num_classes - 1}"
        raise ValueError(f"The label of {name} is {value}; the network knows {known}.")
    return value


@dataclass(frozen=True)
class ImageTransform:
    """Turns an item of any dataset into `{"images": (channels, height, width), "class_labels": ()}`.

    With captions, `captions` (`str`) and `sizes` (4,) come beside them. Sizes are what SDXL is conditioned on, in
    pixels: height and width of the picture as it was, and how far from the top and the left of the resized picture it
    is cropped. The left of a mirrored picture is what was its right.

    Args:
        spec ([`ImageSpec`]): what the network takes.
        image_column, label_column, caption_column (`str`, *optional*): where an item with names has them.
        num_classes (`int`, *optional*): of a class-conditional network, which needs a label for every image.
        captioned (`bool`): the network needs a caption for every image. A `caption_column` says so, too.
    """

    spec: ImageSpec
    image_column: str | None = None
    label_column: str | None = None
    num_classes: int | None = None
    caption_column: str | None = None
    captioned: bool = False

    def __call__(self, example: Any, rng: torch.Generator | None = None, name: str = "the item") -> dict[str, Any]:
        """The item called `name`, cropped and flipped by `rng`, or by torch's global generator."""
        return self.augment(self.read(example, name), rng)

    @property
    def needs_captions(self) -> bool:
        return self.captioned or self.caption_column is not None

    def read(self, example: Any, name: str) -> dict[str, Any]:
        """The item before what is random about it: crop, flip, and which of its captions is taken.

        Its `captions` are all that it has, and its `sizes` the picture's height and width before and after resizing.

        Raises:
            `BadImage`: if its image cannot be read or is not finite.
            `ValueError`: if its image, label or caption does not fit the network.
        """
        image, label, caption = self.split(example, name)
        tensor, sizes = self._image(image, _with_column(name, self.image_column))
        result: dict[str, Any] = {"images": tensor}
        needed = self.num_classes is not None or self.label_column is not None
        if needed and label is None:
            raise ValueError(f"Every image must come with its class, but {name} has no label.")
        # What an unconditional network's dataset holds beside the image may be anything, and is then left out.
        if needed or isinstance(label, int | np.integer) or _is_whole_tensor(label):
            result["class_labels"] = torch.tensor(check_label(label, self.num_classes, name))
        if self.needs_captions:
            result["captions"] = read_captions(caption, _with_column(name, self.caption_column))
            result["sizes"] = sizes
        return result

    def augment(self, item: dict[str, Any], rng: torch.Generator | None = None) -> dict[str, Any]:
        """Random crop and flip, and one of the captions."""
        image, spec = item["images"], self.spec
        height, width = image.shape[-2:]
        top = left = 0
        if (height, width) != (spec.height, spec.width):
            top = int(torch.randint(height - spec.height + 1, (), generator=rng))
            left = int(torch.randint(width - spec.width + 1, (), generator=rng))
            image = image[:, top : top + spec.height, left : left + spec.width]
        mirrored = spec.random_flip and bool(torch.rand((), generator=rng) < 0.5)
        if mirrored:
            image = image.flip(-1)
        result = item | {"images": image.contiguous()}
        if self.needs_captions:
            original_height, original_width, resized_height, resized_width = item["sizes"]
            if spec.center_crop:  # done when it was read
                top, left = centre_crop(resized_height, resized_width, spec)
            if mirrored:
                left = resized_width - spec.width - left
            captions = item["captions"]
            chosen = int(torch.randint(len(captions), (), generator=rng)) if len(captions) > 1 else 0
            sizes = torch.tensor([original_height, original_width, top, left])
            result |= {"captions": captions[chosen], "sizes": sizes}
        return result

    def split(self, example: Any, name: str) -> tuple[Any, Any, Any]:
        """The image, the label and the caption, of which the last two may be `None`."""
        if isinstance(example, Mapping):
            image_column = self.image_column or next((c for c in IMAGE_COLUMNS if c in example), None)
            label_column = self.label_column or next((c for c in LABEL_COLUMNS if c in example), None)
            if image_column is None or image_column not in example:
                allowed = self.image_column or "one of " + ", ".join(IMAGE_COLUMNS)
                raise ValueError(f"Items must hold {allowed}, but {name} holds {', '.join(map(str, example))}.")
            caption_column = self.caption_column
            if self.captioned and caption_column is None:
                caption_column = find_caption_column(example, name)
            return example[image_column], example.get(label_column), example.get(caption_column)
        if isinstance(example, tuple | list):
            beside = example[1] if len(example) > 1 else None
            return (example[0], None, beside) if self.needs_captions else (example[0], beside, None)
        return example, None, None

    def _image(self, image: Any, name: str) -> tuple[Tensor, tuple[int, int, int, int]]:
        """The image, and its height and width before and after resizing."""
        if not isinstance(image, Tensor):
            picture = _open(image, name)
            sizes = picture.height, picture.width, *covering_size(picture.height, picture.width, self.spec)
            return picture_to_tensor(picture, self.spec, name), sizes
        if tuple(image.shape) != self.spec.shape:
            raise ValueError(f"The image of {name} has the shape {tuple(image.shape)}; expected {self.spec.shape}.")
        if not image.is_floating_point():
            raise ValueError(f"The image of {name} is of {image.dtype}; expected floats in {self.spec.value_range}.")
        if not image.sum().isfinite() and not image.isfinite().all():  # the sum says it of all but huge ones
            raise BadImage(f"The image of {name} holds values that are not finite.")
        size = self.spec.height, self.spec.width
        return image.float(), (*size, *size)


def _with_column(name: str, column: str | None) -> str:
    return name if column is None else f"{name}, column {column!r}"


def _is_whole_tensor(label: Any) -> bool:
    return isinstance(label, Tensor) and label.numel() == 1 and not label.is_floating_point()


def _open(image: Any, name: str) -> Any:
    """A PIL image with 8 bits a channel, from what `datasets` stores (bytes and path), a path, an array or a picture.

    Raises:
        `BadImage`: if it cannot be read.
        `ValueError`: if it is an array of another shape, or of anything but 0 to 255.
    """
    from PIL import Image

    if isinstance(image, list | np.ndarray):
        array = np.asarray(image)
        if array.ndim == 3 and array.shape[-1] == 1:
            array = array[..., 0]
        if array.ndim != 2 and not (array.ndim == 3 and array.shape[-1] in (2, 3, 4)):
            raise ValueError(
                f"The image of {name} is an array of the shape {array.shape}; expected (height, width), or (height, "
                "width, channels) of 1 to 4 channels."
            )
        if not np.issubdtype(array.dtype, np.integer) or array.min() < 0 or array.max() > 255:
            raise ValueError(f"The image of {name} is an array of {array.dtype}; expected integers from 0 to 255.")
        image = Image.fromarray(array.astype(np.uint8))
    elif isinstance(image, bytes):
        image = {"bytes": image, "path": None}
    elif isinstance(image, str | Path):
        image = {"bytes": None, "path": str(image)}
    if isinstance(image, Mapping) and image.get("path"):
        name = f"{name} ({image['path']})"
    try:
        if isinstance(image, Mapping):
            import datasets  # knows how to open what is not on this machine

            image = datasets.Image().decode_example(image)
        return _to_eight_bits(image)
    except Exception as error:  # corrupt files raise whatever the decoder of their format trips over
        raise BadImage(f"The image of {name} cannot be read: {error}") from error


def _to_eight_bits(picture: Any) -> Any:
    """Decode, turn upright, and scale down what PIL would cut off at 255."""
    from PIL import Image, ImageOps

    if not isinstance(picture, Image.Image):
        raise ValueError(f"it is a {type(picture).__name__}")
    picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith("I"):
        wide = np.asarray(picture, dtype=np.float64)
        if wide.min() < 0 or wide.max() > 65535:
            raise ValueError("its values lie outside the 16 bits from 0 to 65535")
        return Image.fromarray(np.rint(wide / 257).astype(np.uint8))
    if picture.mode == "F":
        raise ValueError("its values are floats in no known range")
    return picture


def covering_size(height: int, width: int, spec: ImageSpec) -> tuple[int, int]:
    """Height and width of a picture resized until it just covers the network's images, its proportions kept."""
    scale = max(spec.width / width, spec.height / height)
    return max(spec.height, round(height * scale)), max(spec.width, round(width * scale))


def centre_crop(height: int, width: int, spec: ImageSpec) -> tuple[int, int]:
    """How far from the top and the left the middle of a picture of this size begins."""
    return (height - spec.height) // 2, (width - spec.width) // 2


def picture_to_tensor(picture: Any, spec: ImageSpec, name: str = "the picture") -> Tensor:
    """A PIL image in the network's colours and value range, just large enough to cover its size, cropped if centred.

    Args:
        picture (`PIL.Image.Image`): of any mode with 8 bits; transparency is laid on white unless the network has it.
        spec ([`ImageSpec`]): what the network takes.
        name (`str`): for messages.

    Returns:
        `Tensor` of shape `(channels, height, width)`, or larger if it is still to be cropped at random.

    Raises:
        `BadImage`: for a mode whose colours PIL does not know.
        `ValueError`: if networks of so many channels take no pictures.
    """
    from PIL import Image

    if spec.channels not in MODES:
        raise ValueError(f"The image of {name} is a picture; a network of {spec.channels} channels takes tensors.")
    try:
        picture = to_mode(picture, spec.channels)
    except ValueError as error:
        raise BadImage(f"The image of {name} cannot be read: {error}") from error
    if picture.width < spec.width or picture.height < spec.height:
        _warn_of_enlarging(spec.height, spec.width)
    height, width = covering_size(picture.height, picture.width, spec)
    if (width, height) != picture.size:
        picture = picture.resize((width, height), Image.Resampling.LANCZOS)
    if spec.center_crop:
        top, left = centre_crop(height, width, spec)
        picture = picture.crop((left, top, left + spec.width, top + spec.height))
    low, high = spec.value_range
    pixels = torch.from_numpy(np.array(picture, dtype=np.float32)).reshape(picture.height, picture.width, -1)
    return pixels.permute(2, 0, 1).contiguous() / 255 * (high - low) + low


@functools.cache
def _warn_of_enlarging(height: int, width: int) -> None:
    logger.warning("Images smaller than %d x %d are enlarged. This is said once.", height, width)
