"""Which columns of a dataset of `datasets` hold the images, labels and captions, and whether they may."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterator, Sequence
from typing import Any

from cm_diffusers.training.captions import find_caption_column, read_captions
from cm_diffusers.training.images import IMAGE_COLUMNS, ImageTransform, check_label


def has_columns(dataset: Any) -> bool:
    """Whether this is a dataset of `datasets`. One with a transform of the user's gives what that makes instead."""
    transformed = (getattr(dataset, "format", None) or {}).get("type") == "custom"
    return hasattr(dataset, "column_names") and not transformed


def select_columns(dataset: Any, transform: ImageTransform) -> tuple[Any, ImageTransform]:
    """Find the columns, and leave the decoding of images to us, so that a corrupt one can be named.

    Args:
        dataset: a dataset of `datasets`, with rows or streamed.
        transform ([`ImageTransform`]): of its items. It may leave open which columns these are.

    Returns:
        `tuple`: the dataset with the columns that are needed alone, and the transform that knows their names.

    Raises:
        `ValueError`: if it is empty, or a column is missing or has to be told.
    """
    import datasets

    features = dataset.features or {}
    names = list(dataset.column_names or features or next(iter(dataset), {}))
    if not names:
        raise ValueError("The dataset is empty.")
    image, label, caption = transform.image_column, transform.label_column, transform.caption_column
    if image is None:
        image = _find_image_column(names, features)
    if caption is None and transform.captioned:
        caption = find_caption_column(names, "the dataset")
    for role, column in (("image", image), ("label", label), ("caption", caption)):
        if column is not None and column not in names:
            near = difflib.get_close_matches(column, names, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"The dataset has no {role} column {column!r}; it has {', '.join(names)}.{hint}")
    if transform.num_classes is not None and label is None:
        raise ValueError(f"The network is class-conditional: set `label_column` to one of {', '.join(names)}.")
    dataset = dataset.with_format(None)
    if isinstance(features.get(image), datasets.Image):
        dataset = dataset.cast_column(image, datasets.Image(decode=False))
    dataset = dataset.select_columns([column for column in (image, label, caption) if column is not None])
    return dataset, dataclasses.replace(transform, image_column=image, caption_column=caption)


def _find_image_column(names: Sequence[str], features: Any) -> str:
    import datasets

    images = [name for name in names if isinstance(features.get(name), datasets.Image)]
    candidates = images or [name for name in names if name in IMAGE_COLUMNS]
    if len(candidates) != 1:
        found = "none" if not candidates else ", ".join(candidates)
        raise ValueError(f"Set `image_column`: of the columns {', '.join(names)}, these hold images: {found}.")
    return candidates[0]


def check_columns(dataset: Any, transform: ImageTransform) -> None:
    """Labels and captions are cheap to read: one that does not fit is found now, not hours into training.

    Args:
        dataset: a dataset of `datasets` with rows.
        transform ([`ImageTransform`]): of its items, which names the columns.

    Raises:
        `ValueError`: if a class-conditional network does not know a label, or a caption is missing or no text.
    """
    column, num_classes = transform.label_column, transform.num_classes
    if column is not None and num_classes is not None:
        for row, label in enumerate(dataset.select_columns([column])[:][column]):
            check_label(label, num_classes, f"row {row}, column {column!r}")
    for _ in all_captions(dataset, transform.caption_column):
        pass


def all_captions(dataset: Any, column: str | None) -> Iterator[tuple[str, ...]]:
    """The captions of every row, without its image; nothing if there is no such column.

    Raises:
        `ValueError`: if a caption is missing or no text.
    """
    if column is None:
        return
    rows = (value for batch in dataset.select_columns([column]).iter(batch_size=1000) for value in batch[column])
    for row, value in enumerate(rows):
        yield read_captions(value, f"row {row}, column {column!r}")
