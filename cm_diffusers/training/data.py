"""Images for training: from a `datasets` dataset, a folder, the Hub, or tensors, to batches in the network's range."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import logging
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, TensorDataset

from cm_diffusers.training.columns import all_captions, check_columns, has_columns, select_columns
from cm_diffusers.training.images import BadImage, ImageSpec, ImageTransform, check_values

logger = logging.getLogger(__name__)

FILE_KINDS = {".parquet": "parquet", ".arrow": "arrow", ".json": "json", ".jsonl": "json", ".tar": "webdataset"}
# Decoded images are kept, in each worker, when all of them fit in so many bytes: small images cost more to decode
# than to train on.
CACHE_BYTES = 64 * 2**20
# So many bad images in a row are not a few corrupt files but a disk that is gone, or the wrong column.
MOST_BAD_IN_A_ROW = 1000
LOOKED_AT = 16  # images that stand for all


# Loading ---------------------------------------------------------------------------------------------------------


def load_image_dataset(
    path: str, *, name: str | None = None, split: str = "train", streaming: bool = False, data_files: Any = None
) -> Any:
    """A dataset of `datasets`.

    Args:
        path (`str`): a Hub id; a folder of images (with a folder per class, or `metadata.jsonl`), of parquet, arrow or
            json files, or written by `save_to_disk`; or one parquet, arrow or json file.
        name (`str`, *optional*): configuration of the dataset.
        split (`str`): the split, or a part of it such as `"train[:10%]"`. That of one file, and of one saved
            `Dataset`, is `"train"`, whatever it was called before.
        streaming (`bool`): read it as it comes.
        data_files (`str`, `list` or `dict`, *optional*): which files to read, as for `datasets.load_dataset`.

    Raises:
        `ValueError`: if it cannot be found or loaded, saying what was tried, if the split is empty, or for a `name` or
            `data_files` of what has none.
    """
    import datasets

    place = Path(path).expanduser()
    saved = (place / "state.json").exists() or (place / "dataset_dict.json").exists()
    if (place.is_file() or saved) and not (name is None and data_files is None):
        raise ValueError(f"The dataset {path!r} is one by itself: it has neither configurations nor `data_files`.")
    options: dict[str, Any] = {"name": name, "split": split, "streaming": streaming, "data_files": data_files}
    if place.is_file():
        if place.suffix not in FILE_KINDS:
            raise ValueError(f"The dataset {path!r} is a file of none of the kinds {', '.join(FILE_KINDS)}.")
        taken_as, path = f"a file of kind {FILE_KINDS[place.suffix]}", FILE_KINDS[place.suffix]
        options["data_files"] = str(place)
    elif place.is_dir():
        taken_as, path = "a folder" + " written by `save_to_disk`" * saved, str(place)
    elif data_files is None and not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", path):
        raise ValueError(f"The dataset {path!r} is no file or folder here, and cannot be a Hub id.")
    else:
        taken_as = "a dataset of the Hub, as no file or folder has this name"
    try:
        dataset = _load_saved(place, split) if saved else datasets.load_dataset(path, **options)
    except Exception as error:  # datasets raises some thirty kinds
        message = f"Cannot load the split {split!r} of the dataset {str(place)!r} ({taken_as}): {error}"
        raise ValueError(message) from error
    if hasattr(dataset, "__len__") and len(dataset) == 0:
        raise ValueError(f"The split {split!r} of the dataset {str(place)!r} is empty.")
    return dataset.to_iterable_dataset() if saved and streaming else dataset


def _load_saved(place: Path, split: str) -> Any:
    import datasets

    saved = datasets.load_from_disk(str(place))
    is_one = not isinstance(saved, datasets.DatasetDict)
    splits = {str(saved.split or "train"): saved, "train": saved} if is_one else dict(saved)
    return splits[split] if split in splits else _part(splits, split)


def _part(splits: Mapping[str, Any], wanted: str) -> Any:
    """What `datasets` calls so of several splits: `"train[:10%]"`, `"train+test"` and the like."""
    import datasets

    if missing := [name for name in re.findall(r"(?:^|\+)\s*([^[+\s]+)", wanted) if name not in splits]:
        raise ValueError(f"it has the splits {', '.join(splits)}, and not {missing[0]}.")
    parts = datasets.ReadInstruction.from_spec(wanted).to_absolute({name: len(rows) for name, rows in splits.items()})
    return datasets.concatenate_datasets([splits[part.splitname].select(range(part.from_, part.to)) for part in parts])


def prepare_dataset(
    dataset: Any,
    spec: ImageSpec,
    *,
    image_column: str | None = None,
    label_column: str | None = None,
    on_bad_image: Literal["error", "skip"] = "error",
    num_classes: int | None = None,
    caption_column: str | None = None,
    captioned: bool = False,
) -> Dataset[dict[str, Any]]:
    """A torch dataset of the items that [`~cm_diffusers.training.images.ImageTransform`] makes, checked on its first.

    Args:
        dataset: a dataset of `datasets` (streaming or not), a tensor of shape `(n, channels, height, width)` in the
            network's range, or a torch dataset of such images or PIL images, of dicts, of `(image, label)` or, where
            captions are needed, of `(image, caption)`.
        spec ([`ImageSpec`]): what the network takes.
        image_column (`str`, *optional*): found by itself when there is one candidate.
        label_column (`str`, *optional*): class labels, whole numbers. Columns need it; torch datasets show theirs.
        on_bad_image (`str`): what an image does that cannot be read or is not finite. `"error"` stops, naming it;
            `"skip"` warns, once, and takes the next good one in its place (in a stream, leaves it out).
        num_classes (`int`, *optional*): of a class-conditional network, which needs a label below it for every image.
        caption_column (`str`, *optional*): found by itself when there is one candidate and captions are needed.
        captioned (`bool`): the network needs a caption for every image; so it does if `caption_column` is given.

    Raises:
        `TypeError`: if `dataset` is none of these.
        `ValueError`: if it is empty, a column is missing, a label of a column is out of range, a caption of a column
            is missing or no text, or its first item does not fit.
    """
    if on_bad_image not in ("error", "skip"):
        raise ValueError(f"`on_bad_image` must be 'error' or 'skip', got {on_bad_image!r}.")
    if isinstance(dataset, str | Path):
        raise TypeError(f"`dataset` must be a dataset or a tensor of images; load {str(dataset)!r}, or set `dataset`.")
    if isinstance(dataset, Mapping):
        raise TypeError(f"`dataset` must be one dataset, got several by name: {', '.join(map(str, dataset))}.")
    if isinstance(dataset, Tensor):
        if dataset.ndim != 4:
            raise ValueError(f"A tensor of images must be (n, channels, height, width), got {tuple(dataset.shape)}.")
        bad = dataset.flatten(1).isfinite().all(1).logical_not().nonzero()
        if len(bad) and on_bad_image == "error":
            raise ValueError(f"The image of row {int(bad[0])} holds values that are not finite.")
        dataset = TensorDataset(dataset)
    if isinstance(dataset, TensorDataset):
        check_values(dataset.tensors[0], spec)
    is_column_data = has_columns(dataset)
    streamed = isinstance(dataset, IterableDataset) or (is_column_data and not hasattr(dataset, "__len__"))
    if not streamed and not (hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")):
        raise TypeError(f"`dataset` must be a dataset or a tensor of images, got {type(dataset).__name__}.")
    if not streamed and len(dataset) == 0:
        raise ValueError("The dataset is empty.")
    transform = ImageTransform(spec, image_column, label_column, num_classes, caption_column, captioned)
    if is_column_data:
        dataset, transform = select_columns(dataset, transform)
        if not streamed:
            check_columns(dataset, transform)
    make: Any = StreamedImages if streamed else MappedImages
    prepared: Dataset[dict[str, Any]] = make(dataset, transform, skip_bad=on_bad_image == "skip")
    prepared.check_first()  # type: ignore[attr-defined]
    return prepared


# Datasets --------------------------------------------------------------------------------------------------------


class _Images:
    """What both kinds of datasets share: reading one item, what a bad one does, and what range values are in."""

    def __init__(self, dataset: Any, transform: ImageTransform, skip_bad: bool) -> None:
        self.dataset, self.transform, self.skip_bad = dataset, transform, skip_bad
        self._bad: set[int] = set()

    @property
    def fields(self) -> dict[str, tuple[int, ...]]:
        """The large tensors of an item, with their shapes."""
        return {"images": self.transform.spec.shape}

    def _tensor_of(self, raw: Any) -> Tensor | None:
        """An item's image, if it is a tensor that fits: its range of values is the caller's choice."""
        with contextlib.suppress(ValueError):
            image = self.transform.split(raw, "the item")[0]
            if isinstance(image, Tensor) and tuple(image.shape) == self.transform.spec.shape:
                return image
        return None

    def _check_values(self, raws: Iterable[Any]) -> None:
        """Tell what is wrong with the range of those images that are tensors."""
        images = [image for raw in raws if (image := self._tensor_of(raw)) is not None]
        if images:
            check_values(torch.stack(images), self.transform.spec)

    def _read_or_skip(self, index: int, raw: Any, name: str) -> dict[str, Any] | None:
        try:
            return self.transform.read(raw, name)
        except BadImage as error:
            if not self.skip_bad:
                raise
            if index not in self._bad:
                logger.warning("%s It is skipped.", error)
            self._bad.add(index)
            return None


class MappedImages(_Images, Dataset[dict[str, Any]]):
    """A dataset with a length. A bad image is replaced by the next good one when it may be skipped."""

    def __init__(self, dataset: Any, transform: ImageTransform, skip_bad: bool) -> None:
        super().__init__(dataset, transform, skip_bad)
        is_table = has_columns(dataset)
        self._changes = not is_table and not isinstance(dataset, TensorDataset)
        fits = len(dataset) * math.prod(transform.spec.shape) * 4 <= CACHE_BYTES and transform.spec.center_crop
        # Only columns are known to give the same image every time, and to need decoding.
        self._cache: dict[int, dict[str, Any]] | None = {} if fits and is_table else None

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int | tuple[int, int]) -> dict[str, Any]:
        """Row `index`, cropped and flipped by torch's global generator; or, for `(row, seed)`, by a generator of that
        seed, which the item then carries."""
        row, seed = index if isinstance(index, tuple) else (index, None)
        if not -len(self) <= row < len(self):
            raise IndexError(f"The dataset has {len(self)} images; there is no row {row}.")
        item = self._next_good(row % len(self))
        if seed is None:
            return self.transform.augment(item, None)
        augmented = self.transform.augment(item, torch.Generator().manual_seed(seed))
        return {**augmented, "seed": torch.tensor(seed)}

    def check_first(self) -> None:
        """Raise what the first image has against it, and what the range of some has, if they are tensors."""
        first = self.dataset[0]
        if self._take_in(0, first) is None:
            self._next_good(0)
        if not isinstance(self.dataset, TensorDataset) and self._tensor_of(first) is not None:
            self._check_values([first, *(self.dataset[row] for row in self._some_rows()[1:])])

    def identity(self) -> dict[str, Any]:
        """What tells this dataset from another: its length, and a digest of some of its images and of all captions.

        A torch dataset may give other images each time: it has no digest.
        """
        if self._changes:
            return {"rows": len(self)}
        captions = all_captions(self.dataset, self.transform.caption_column)
        return {"rows": len(self), "digest": _digest((self._next_good(row) for row in self._some_rows()), captions)}

    def _some_rows(self) -> list[int]:
        """Up to `LOOKED_AT`, from the first to the last."""
        return sorted({(len(self) - 1) * part // (LOOKED_AT - 1) for part in range(LOOKED_AT)})

    def _next_good(self, index: int) -> dict[str, Any]:
        tries = min(len(self), MOST_BAD_IN_A_ROW)
        for row in range(index, index + tries):
            if (item := self._read(row % len(self))) is not None:
                return item
        raise ValueError(f"None of the {tries} images from row {index} on can be read.")

    def _read(self, row: int) -> dict[str, Any] | None:
        if self._cache is not None and row in self._cache:
            return self._cache[row]
        return None if row in self._bad else self._take_in(row, self.dataset[row])

    def _take_in(self, row: int, raw: Any) -> dict[str, Any] | None:
        item = self._read_or_skip(row, raw, f"row {row}")
        if self._cache is not None and item is not None:
            self._cache[row] = item
        return item


class StreamedImages(_Images, IterableDataset[dict[str, Any]]):
    """A dataset that comes one by one. Bad images are left out when they may be skipped."""

    def __init__(self, dataset: Any, transform: ImageTransform, skip_bad: bool) -> None:
        super().__init__(dataset, transform, skip_bad)
        self._held: list[Any] = []

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """The images in the order they come, cropped and flipped alike every time."""
        return self._augmented(self._raw())

    def first(self, count: int) -> list[dict[str, Any]]:
        """Up to so many images, as iterating gives them. Those of a stream that can be read only once come again."""
        held, taken = self._held, list[Any]()
        stream = itertools.chain(held, self.dataset)
        images = self._augmented(taken.append(raw) or raw for raw in stream)  # type: ignore[func-returns-value]
        items = list(itertools.islice(images, count))
        self._held = taken + held[len(taken) :] if held else []
        return items

    def shards_of_a_rank(self, world_size: int) -> int | None:
        """How many workers of one process have something to read; `None` if this is not a dataset of `datasets`."""
        shards = getattr(self.dataset, "num_shards", None)
        if shards is None or shards % world_size:
            return shards
        return int(shards // world_size)

    def part(
        self, epoch: int, seed: int, buffer_size: int, rank: int, world_size: int, start: int
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        """One process's images of a pass, with their index, from the index `start` on.

        A dataset of `datasets` is shuffled and gives whole shards to the processes where their number allows. Another
        keeps the order it comes in (or has for this epoch, if it has a `set_epoch`), and is dealt out in turn.
        """
        if hasattr(self.dataset, "column_names"):
            from datasets.distributed import split_dataset_by_node

            shuffled = self.dataset.shuffle(seed=seed, buffer_size=buffer_size)
            stream: Iterable[Any] = split_dataset_by_node(shuffled, rank=rank, world_size=world_size)
        else:
            if hasattr(self.dataset, "set_epoch"):
                self.dataset.set_epoch(epoch)
            stream = itertools.islice(self._raw(), rank, None, world_size)
        return self._good(stream, start)

    def _augmented(self, stream: Iterable[Any]) -> Iterator[dict[str, Any]]:
        for index, item in self._good(stream):
            yield self.transform.augment(item, torch.Generator().manual_seed(index))

    def _raw(self) -> Iterable[Any]:
        held, self._held = self._held, []
        return itertools.chain(held, self.dataset)

    def check_first(self) -> None:
        """Raise what the first images have against them. Nothing is lost, even of a stream that is read only once."""
        stream = iter(self.dataset)
        taken: list[Any] = []
        first = next(self._good(taken.append(raw) or raw for raw in stream), None)  # type: ignore[func-returns-value]
        if first is None:
            raise ValueError("The dataset is empty, or holds no image that can be read.")
        if self._tensor_of(taken[-1]) is not None:
            taken.extend(itertools.islice(stream, LOOKED_AT - 1))
            self._check_values(taken)
        if iter(self.dataset) is stream:
            self._held = taken

    def identity(self) -> dict[str, Any]:
        """What tells this dataset from another: its shards, and a digest of its first item if it can be reread."""
        shards = self.shards_of_a_rank(1)
        if self._held:
            return {"shards": shards}
        first = next(self._good(iter(self.dataset)), None)
        items = [] if first is None else [first[1]]
        captions = [item["captions"] for item in items if "captions" in item]
        return {"shards": shards, "digest": _digest(items, captions)}

    def _good(self, stream: Iterable[Any], start: int = 0) -> Iterator[tuple[int, dict[str, Any]]]:
        in_a_row = 0
        for index, raw in enumerate(stream):
            if index < start:
                continue
            item = self._read_or_skip(index, raw, f"item {index} of the stream")
            in_a_row = in_a_row + 1 if item is None else 0
            if in_a_row == MOST_BAD_IN_A_ROW:
                raise ValueError(f"None of {in_a_row} images in a row, up to item {index} of the stream, can be read.")
            if item is not None:
                yield index, item


def _digest(items: Iterable[dict[str, Any]], captions: Iterable[tuple[str, ...]]) -> str:
    digest = hashlib.sha256()
    for item in items:
        digest.update(item["images"].contiguous().numpy().tobytes())
    for several in captions:
        digest.update(json.dumps(several).encode())
    return digest.hexdigest()
