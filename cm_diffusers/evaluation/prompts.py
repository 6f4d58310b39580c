"""The prompts that images are made of while they are measured."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from cm_diffusers.evaluation.metrics import evenly_spread
from cm_diffusers.training.captions import read_captions
from cm_diffusers.training.columns import all_captions


@dataclass(frozen=True)
class Prompts:
    """Texts of which images are made in turn: the image of seed i is one of text i mod n.

    Args:
        texts (`tuple[str, ...]`): one at least.
        name (`str`): what they are.
    """

    texts: tuple[str, ...]
    name: str

    def __post_init__(self) -> None:
        if not self.texts:
            raise ValueError(f"There must be one prompt at least, and there is none in {self.name}.")

    def __str__(self) -> str:
        return f"{len(self.texts):,} of {self.name}"

    @cached_property
    def digest(self) -> str:
        """Of the texts and their order."""
        return hashlib.sha256(json.dumps(self.texts).encode()).hexdigest()[:16]

    @classmethod
    def from_file(cls, path: str | Path) -> Prompts:
        """The lines of a text file that are not empty.

        Raises:
            `ValueError`: if there are none, or it cannot be read as text in UTF-8.
        """
        try:
            lines = Path(path).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"The prompts in {path} cannot be read: {error}") from error
        return cls(tuple(text for line in lines if (text := line.strip())), Path(path).name)

    @classmethod
    def from_dataset(cls, dataset: Any, name: str, count: int) -> Prompts:
        """Captions of up to `count` images of a prepared dataset, spread evenly over it (of a stream, the first).

        Of an image with several captions, the first. Where captions have a column, no image is read.

        Args:
            dataset: as [`~cm_diffusers.training.data.prepare_dataset`] makes it, with captions.
            name (`str`): of the dataset.
            count (`int`): 1 at least.
        """
        streamed, column = not hasattr(dataset, "__len__"), dataset.transform.caption_column
        if streamed:
            texts = _of_stream(dataset, column, count)
        else:
            texts = _of_rows(dataset, column, evenly_spread(len(dataset), count).tolist())
        return cls(tuple(texts), f"the captions of {name}")


def _of_stream(dataset: Any, column: str | None, count: int) -> list[str]:
    if column is not None and hasattr(dataset.dataset, "select_columns"):
        return [captions[0] for captions in itertools.islice(all_captions(dataset.dataset, column), count)]
    return [item["captions"] for item in itertools.islice(dataset, count)]


def _of_rows(dataset: Any, column: str | None, rows: Sequence[int]) -> list[str]:
    if column is not None and hasattr(dataset.dataset, "select_columns"):
        found = dataset.dataset.select_columns([column])[rows][column]
        return [read_captions(value, f"row {row}")[0] for row, value in zip(rows, found, strict=True)]
    return [dataset[row, 0]["captions"] for row in rows]  # of several, always the same one
