"""Many images as one picture."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image


def image_grid(images: np.ndarray, columns: int | None = None, smallest: int = 512) -> Image:
    """Arrange images in rows.

    Args:
        images (`np.ndarray` of shape `(n, height, width, channels)`): values in [0, 1]; 1, 3 or 4 channels (of other
            numbers the first is shown).
        columns (`int`, *optional*): images in a row; about the square root of `n` when `None`.
        smallest (`int`): small pictures are enlarged by whole factors up to about this many pixels across.
    """
    from PIL import Image

    count, height, width, channels = images.shape
    if channels not in (1, 3, 4):
        images, channels = images[..., :1], 1
    columns = columns or math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    canvas = np.ones((rows * (height + 1) + 1, columns * (width + 1) + 1, channels), dtype=np.float32)
    for index, image in enumerate(images):
        top, left = 1 + index // columns * (height + 1), 1 + index % columns * (width + 1)
        canvas[top : top + height, left : left + width] = image
    pixels = (canvas.clip(0, 1) * 255).round().astype(np.uint8)
    picture = Image.fromarray(pixels[..., 0] if channels == 1 else pixels)
    factor = max(1, smallest // picture.width)
    return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)


def save_grid(images: Any, path: Path, columns: int | None = None) -> None:
    """Write [`image_grid`] to a file, making its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image_grid(np.asarray(images), columns).save(path)
