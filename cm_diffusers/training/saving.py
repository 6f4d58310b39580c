"""Folders that are written beside their place and moved there: who looks finds the old or the new."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PARTIAL = ".student-"


@contextlib.contextmanager
def workplace(folder: Path) -> Iterator[Path]:
    """A folder within another for what is half done, deleted at the end."""
    place = Path(tempfile.mkdtemp(prefix=PARTIAL, dir=folder))
    try:
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)


def clean(folder: Path) -> None:
    """Delete the workplaces of processes that were killed."""
    for place in folder.glob(f"{PARTIAL}*"):
        shutil.rmtree(place, ignore_errors=True)


def save_into(pipeline: Any, folder: Path) -> None:
    """Save a pipeline's parts into a folder that may hold other things, too."""
    with workplace(folder) as place:
        pipeline.save_pretrained(place)
        for part in sorted(place.iterdir()):
            old = folder / part.name
            if old.is_dir():
                shutil.rmtree(old)
            os.replace(part, old)
