"""Latents and prompt embeddings that were computed once, in files that are known to be whole when they are read.

A cache is a folder. `plan.json` says what it is made from and how its rows are divided into shards. A shard is a file
`latents-00012.safetensors` with its record `latents-00012.json` beside it. `latents.json`, written last, describes the
whole.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import Dataset

from cm_diffusers.training.checkpoints import digest_of_file, flush
from cm_diffusers.training.resuming import compare

logger = logging.getLogger(__name__)

PLAN = "plan.json"
MANIFEST = "latents.json"


class CacheError(ValueError):
    """A cache that is missing, torn or was changed after it was written, or that cannot be written."""


def _shard_path(folder: Path, shard: int) -> Path:
    return folder / f"latents-{shard:05d}.safetensors"


# Writing ---------------------------------------------------------------------------------------------------------


class CacheWriter:
    """Writes a cache shard by shard. Killed at any instant, it goes on where it was and loses one shard at most.

    Several processes may write shards of their own into one folder, once the first of them has opened it.

    Args:
        folder (`str` or `Path`): of the cache.
        identity (`dict`): what the rows are computed from, in plain JSON values: the dataset, the networks, the dtype.
        rows (`int`): of the whole cache.
        shard_rows (`int`): of every shard but the last, which may have fewer.

    Raises:
        `TypeError`: if `identity` cannot be written as JSON.
        `ValueError`: if the folder holds a cache made from something else, naming each difference.
        [`CacheError`]: if it holds shards but not what they are made from.
    """

    def __init__(self, folder: str | Path, identity: dict[str, Any], rows: int, shard_rows: int = 1024) -> None:
        for name, count in (("rows", rows), ("shard_rows", shard_rows)):
            if count < 1:
                raise ValueError(f"`{name}` must be at least 1, got {count}.")
        try:
            identity = json.loads(json.dumps(identity))  # as it will be when it is read: without tuples
        except (TypeError, ValueError) as error:
            raise TypeError(f"`identity` must hold plain JSON values: {error}.") from None
        self.folder, self.rows, self.shard_rows = Path(folder), rows, shard_rows
        self.plan = {"identity": identity, "rows": rows, "shard_rows": shard_rows}
        self._open()

    def missing_of(self, shard: int) -> tuple[int, int] | None:
        """The rows `(start, stop)` of a shard that is still to be written; `None` if it is there and whole.

        What is there is read in full. Processes that share the work need one list of all shards: take it before any
        of them writes.
        """
        return None if self._is_whole(shard) else self._range(shard)

    def write(self, start: int, tensors: Mapping[str, Tensor]) -> None:
        """Write one shard. It is there whole when this returns, and before that not at all.

        Args:
            start (`int`): its first row, as [`~CacheWriter.missing_of`] has it.
            tensors (`Mapping[str, Tensor]`): each of shape `(stop - start, ...)`, on any device, of any dtype.

        Raises:
            `ValueError`: if no shard starts there, or a tensor has another number of rows.
            [`CacheError`]: if it cannot be written, for instance because the disk is full. Nothing is left of it.
        """
        shard, within = divmod(start, self.shard_rows)
        if within or not 0 <= start < self.rows:
            raise ValueError(f"`start` must be a multiple of {self.shard_rows} below {self.rows}, got {start}.")
        start, stop = self._range(shard)
        _check_rows(tensors, stop - start)
        # Each in memory of its own: safetensors takes no two views of the same.
        whole = {name: t.detach().cpu().clone(memory_format=torch.contiguous_format) for name, t in tensors.items()}
        path = _shard_path(self.folder, shard)
        record: dict[str, Any] = {"tensors": {name: _describe(tensor) for name, tensor in whole.items()}}

        def write(partial: Path) -> None:
            save_file(whole, partial)
            shutil.copymode(self.folder / PLAN, partial)  # safetensors lets nobody but the owner read its files
            record.update(bytes=partial.stat().st_size, sha256=digest_of_file(partial))

        _write_file(path, write)
        _write_json(path.with_suffix(".json"), record)

    def finish(self) -> None:
        """Describe the whole cache, so that it can be read.

        Raises:
            [`CacheError`]: if a shard is missing, or has other tensors than the first.
        """
        found = [_read_record(self.folder, shard) for shard in range(self.num_shards)]
        records = [record for record in found if record is not None]
        if len(records) < self.num_shards:
            start, stop = self._range(found.index(None))
            count = self.num_shards - len(records)
            raise CacheError(f"The cache {self.folder} lacks {count} shards, the first of rows {start} to {stop - 1}.")
        tensors = records[0]["tensors"]
        for shard, record in enumerate(records):
            if differences := compare(f"shard {shard}", tensors, record["tensors"]):
                raise CacheError(f"The shards of {self.folder} are not alike: {'; '.join(differences)}.")
        shards = [{"bytes": record["bytes"], "sha256": record["sha256"]} for record in records]
        whole = {**self.plan, "tensors": tensors, "shards": shards}
        _write_json(self.folder / MANIFEST, {**whole, "sha256": _digest_of(whole)})

    @property
    def num_shards(self) -> int:
        return -(-self.rows // self.shard_rows)

    def _range(self, shard: int) -> tuple[int, int]:
        start = shard * self.shard_rows
        return start, min(start + self.shard_rows, self.rows)

    def _open(self) -> None:
        """Take the folder, or go on with what is in it if that is made from the same."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / PLAN
        if not path.exists():
            if any(self.folder.glob("latents*")):
                raise CacheError(f"{self.folder} holds latents, but not {PLAN}, which says what from: delete them.")
            _write_json(path, self.plan)
        differences = [
            text for name in self.plan for text in compare(name, _read_json(path).get(name), self.plan[name])
        ]
        if differences:
            raise ValueError(
                f"The cache {self.folder} is made from something else: {'; '.join(differences)}. Take another folder, "
                "or delete it."
            )

    def _is_whole(self, shard: int) -> bool:
        path = _shard_path(self.folder, shard)
        record = _read_record(self.folder, shard)
        if record is not None and digest_of_file(path) == record["sha256"]:
            return True
        if path.exists():
            logger.warning("The shard %s is not what was written. It is made again.", path)
        return False


def _check_rows(tensors: Mapping[str, Tensor], rows: int) -> None:
    if not tensors:
        raise ValueError("`tensors` must hold at least one tensor, got none.")
    for name, tensor in tensors.items():
        if name == "seed":
            raise ValueError("`tensors` must not hold 'seed': that is what a row's random numbers are called.")
        if tensor.ndim == 0 or len(tensor) != rows:
            raise ValueError(f"`tensors[{name!r}]` must have {rows} rows, got the shape {tuple(tensor.shape)}.")


def _describe(tensor: Tensor) -> dict[str, Any]:
    return {"shape": list(tensor.shape[1:]), "dtype": str(tensor.dtype).removeprefix("torch.")}


def _write_file(path: Path, write: Callable[[Path], Any]) -> None:
    """Write a file beside its final place, then move it there."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        write(partial)
        flush(partial)
        os.replace(partial, path)
        flush(path.parent)
    # safetensors has an exception of its own for a full disk.
    except (OSError, SafetensorError) as error:
        partial.unlink(missing_ok=True)
        free = shutil.disk_usage(path.parent).free / 2**20
        message = f"{path} cannot be written, {free:.0f} MiB are free there: {error}. What is there already stays."
        raise CacheError(message) from error


def _write_json(path: Path, values: dict[str, Any]) -> None:
    _write_file(path, lambda partial: partial.write_text(json.dumps(values, indent=2)))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CacheError(f"{path} cannot be read: {error}.") from error
    if not isinstance(values, dict):
        raise CacheError(f"{path} is not what was written.")
    return values


def _read_record(folder: Path, shard: int) -> dict[str, Any] | None:
    """What was noted of a shard when it was written; `None` if it is not there in its full length."""
    path = _shard_path(folder, shard)
    try:
        record = _read_json(path.with_suffix(".json"))
        is_there = record.keys() == {"tensors", "bytes", "sha256"} and path.stat().st_size == record["bytes"]
    except (CacheError, OSError):
        return None
    return record if is_there else None


def _digest_of(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


# Reading ---------------------------------------------------------------------------------------------------------


class CachedLatents(Dataset[dict[str, Tensor]]):
    """The rows of a finished cache. No more of it is in memory than the rows that are asked for.

    Args:
        folder (`str` or `Path`): of the cache.
        verify (`bool`): read all of it now, to see that it is what was written. Otherwise only sizes are compared.

    Attributes:
        fields (`dict[str, tuple[int, ...]]`): the names of a row's tensors, with their shapes.

    Raises:
        [`CacheError`]: if the cache is not finished, a shard is missing, torn or altered, naming it.
    """

    def __init__(self, folder: str | Path, verify: bool = True) -> None:
        self.folder = Path(folder)
        manifest = _read_json(self.folder / MANIFEST)
        if manifest.pop("sha256", None) != _digest_of(manifest):
            raise CacheError(f"{self.folder / MANIFEST} is not what was written.")
        self._manifest = manifest
        self.fields = {name: tuple(tensor["shape"]) for name, tensor in manifest["tensors"].items()}
        self._opened: dict[int, Any] = {}
        for shard in range(self.num_shards):
            self.check_shard(shard, verify)

    def __len__(self) -> int:
        return int(self._manifest["rows"])

    def __getitem__(self, index: int | tuple[int, int]) -> dict[str, Tensor]:
        """The tensors of row `index`; for `(row, seed)` with the `seed`, too."""
        row, seed = index if isinstance(index, tuple) else (index, None)
        if not -len(self) <= row < len(self):
            raise IndexError(f"The cache has {len(self)} rows; there is no row {row}.")
        shard, within = divmod(row % len(self), self._manifest["shard_rows"])
        file = self._file(shard)
        # A slice is a view of the mapped file, and would take all of it along.
        item = {name: file.get_slice(name)[within : within + 1][0].clone() for name in self.fields}
        return item if seed is None else {**item, "seed": torch.tensor(seed)}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": {}}  # every worker opens the files for itself

    def check_first(self) -> None:
        """Raise what the first row has against it."""
        self[0]

    @property
    def num_shards(self) -> int:
        return len(self._manifest["shards"])

    def check_shard(self, shard: int, verify: bool = True) -> None:
        """See that a shard is there as it was written: in its length, and, to `verify` it, in all it holds.

        Raises:
            [`CacheError`]: if it is not, naming it.
        """
        path, record = _shard_path(self.folder, shard), self._manifest["shards"][shard]
        try:
            size = path.stat().st_size
            if size != record["bytes"]:
                raise CacheError(f"The shard {path} has {size} bytes; {record['bytes']} were written.")
            if verify and digest_of_file(path) != record["sha256"]:
                raise CacheError(f"The shard {path} is corrupt: it is not what was written.")
        except OSError as error:
            raise CacheError(f"The shard {path} cannot be read: {error}.") from error

    def identity(self) -> dict[str, Any]:
        """What tells this dataset from another: its length, a digest of all rows, and what they are made from."""
        digest = _digest_of([record["sha256"] for record in self._manifest["shards"]])
        return {"rows": len(self), "digest": digest, "made_from": self._manifest["identity"]}

    def _file(self, shard: int) -> Any:
        if shard not in self._opened:
            path = _shard_path(self.folder, shard)
            try:
                self._opened[shard] = safe_open(path, framework="pt")
            except (OSError, SafetensorError) as error:
                raise CacheError(f"The shard {path} cannot be read: {error}.") from error
        return self._opened[shard]
