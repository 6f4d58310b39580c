"""Checkpoints that appear whole or not at all, and are known to be whole when they are read."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
STATE = "state.json"


class CheckpointError(ValueError):
    """A checkpoint that is missing, torn or was changed after it was written."""


def checkpoint_path(root: Path, step: int) -> Path:
    return root / f"step-{step:08d}"


def write_files(folder: Path, write: Callable[[Path], None]) -> None:
    """Write a checkpoint beside its final place, then move it there. Called by one process.

    Args:
        folder (`Path`): the checkpoint's final folder.
        write (`Callable`): writes the files into the folder it is given.

    Raises:
        `CheckpointError`: if it cannot be written, for instance because the disk is full. Nothing is left of it, and
            older checkpoints stay.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        write(partial)
        digests = {str(p.relative_to(partial)): digest_of_file(p) for p in sorted(partial.rglob("*")) if p.is_file()}
        (partial / MANIFEST).write_text(json.dumps(digests, indent=2))
        for path in [*partial.rglob("*"), partial]:
            flush(path)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(partial, folder)
        flush(folder.parent)
    # safetensors has an exception of its own for a full disk.
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        free = shutil.disk_usage(next(place for place in folder.parents if place.is_dir())).free / 2**20
        last = next(iter(_newest_first(folder.parent)), None)
        kept = f"The last checkpoint is {last}." if last else "There is no earlier checkpoint."
        raise CheckpointError(
            f"Checkpoint {folder} cannot be written, {free:.0f} MiB are free there: {error}. {kept}"
        ) from error


def prune(newest: Path, keep: int) -> None:
    """Delete all but `keep` of the checkpoints up to `newest`, which was just written.

    Later ones are damaged, or of a run that was gone back on: they do not count as something to fall back to.
    """
    for folder in [folder for folder in _newest_first(newest.parent) if folder <= newest][keep:]:
        try:
            shutil.rmtree(folder.replace(folder.with_name(f".{folder.name}.old")))
        except OSError as error:
            logger.warning("The old checkpoint %s cannot be deleted: %s", folder, error)


def clean(root: Path) -> None:
    """Delete what runs that were killed have left half written or half deleted."""
    for pattern in (".step-*.partial", ".step-*.old"):
        for folder in root.glob(pattern):
            shutil.rmtree(folder, ignore_errors=True)


def verify(folder: Path) -> dict[str, Any]:
    """Check every file of a checkpoint, and return its state.

    Raises:
        `CheckpointError`: if a file is missing or is not what was written, naming it.
    """
    try:
        digests = json.loads((folder / MANIFEST).read_text())
        for name, digest in digests.items():
            if digest_of_file(folder / name) != digest:
                raise CheckpointError(f"Checkpoint {folder} is corrupt: {name} is not what was written.")
        state: dict[str, Any] = json.loads((folder / STATE).read_text())
    except CheckpointError:
        raise
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(f"Checkpoint {folder} is not whole: {error}") from error
    return state


def refuse_to_start_anew(root: Path) -> None:
    """See that no earlier run would be mixed up with a new one.

    Raises:
        `ValueError`: if there are checkpoints under `root`.
    """
    if folders := _newest_first(root):
        raise ValueError(
            f"`output_dir` holds checkpoints of an earlier run, the last {folders[0].name}: go on with it "
            f"(`resume: auto`), take another `output_dir`, or delete {root}."
        )


def find(resume: str, root: Path) -> tuple[Path, dict[str, Any]] | None:
    """The checkpoint to resume from, with its state.

    Args:
        resume (`str`): `"auto"` for the newest whole checkpoint under `root` (`None` if there is none; damaged ones
            are named in a warning and passed over), or the folder of a checkpoint.

    Raises:
        `CheckpointError`: if the named checkpoint is missing or damaged, or all of them are.
    """
    if resume != "auto":
        return Path(resume), verify(Path(resume))
    folders = _newest_first(root)
    for folder in folders:
        try:
            return folder, verify(folder)
        except CheckpointError as error:
            logger.warning("%s It is passed over.", error)
    if folders:
        raise CheckpointError(f"None of the {len(folders)} checkpoints in {root} is whole. Nothing was deleted.")
    return None


def _newest_first(root: Path) -> list[Path]:
    return sorted(root.glob("step-*"), reverse=True)


def digest_of_file(path: Path) -> str:
    """SHA-256 of what a file holds, in hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def flush(path: Path) -> None:
    """See that a file, or a folder's list of files, is on the disk when this returns."""
    is_folder = path.is_dir()
    if is_folder and os.name == "nt":
        return  # where folders cannot be opened, and files have to be for writing
    descriptor = os.open(path, os.O_RDONLY if is_folder else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
