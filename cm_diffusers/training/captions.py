"""The captions of images, in whatever form a dataset stores them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

CAPTION_COLUMNS = ("caption", "captions", "text", "txt", "prompt")


def find_caption_column(names: Iterable[Any], holder: str) -> str:
    """The one of `names` that captions usually go by.

    Args:
        names (`Iterable`): the columns of a dataset, or the keys of an item.
        holder (`str`): which dataset or item, for messages.

    Raises:
        `ValueError`: if none of them is, or more than one.
    """
    names = list(map(str, names))
    candidates = [name for name in names if name in CAPTION_COLUMNS]
    if len(candidates) != 1:
        found = ", ".join(candidates) or "none"
        raise ValueError(
            f"Set `caption_column`: {holder} has {', '.join(names)}, of which these may hold captions: {found}."
        )
    return candidates[0]


def read_captions(value: Any, name: str) -> tuple[str, ...]:
    """The captions of the item called `name`: one, or several to choose from.

    Args:
        value (`str`, `bytes`, or a `list` or `tuple` of them): bytes are UTF-8. A caption may be empty.
        name (`str`): for messages.

    Raises:
        `ValueError`: if there is no caption, or it is something else.
    """
    captions = value if isinstance(value, list | tuple) else [value]
    if value is None or not captions:
        raise ValueError(f"Every image must come with its caption, but {name} has none.")
    return tuple(_as_text(caption, name) for caption in captions)


def _as_text(caption: Any, name: str) -> str:
    if isinstance(caption, bytes):
        try:
            caption = caption.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"The caption of {name} must be text in UTF-8: {error}.") from None
    if not isinstance(caption, str):
        raise ValueError(
            f"The caption of {name} must be a string, bytes in UTF-8 or a list of them, got {caption!r:.80}."
        )
    return str(caption)  # NumPy has strings of its own
