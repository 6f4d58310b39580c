"""Images for training: from a `datasets` dataset, a folder, the Hub, or tensors, to batches in the network's range."""

from __future__ import annotations

import copy
import difflib
import itertools
import logging
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, TensorDataset, get_worker_info

from cm_diffusers.training.images import IMAGE_COLUMNS, BadImage, ImageSpec, ImageTransform, check_label

logger = logging.getLogger(__name__)

FILE_KINDS = {".parquet": "parquet", ".arrow": "arrow", ".json": "json", ".jsonl": "json"}
# Decoded images are kept, in each worker, when all of them fit in so many bytes: small images cost more to decode
# than to train on.
CACHE_BYTES = 64 * 2**20
# So many bad images in a row are not a few corrupt files but a disk that is gone, or the wrong column.
MOST_BAD_IN_A_ROW = 1000


# Loading ---------------------------------------------------------------------------------------------------------


def load_image_dataset(
    path: str, *, name: str | None = None, split: str = "train", streaming: bool = False, data_files: Any = None
) -> Any:
    """A dataset of `datasets`.

    Args:
        path (`str`): a Hub id; a folder of images (with a folder per class, or `metadata.jsonl`), of parquet, arrow or
            json files, or written by `save_to_disk`; or one parquet, arrow or json file.
        name (`str`, *optional*): configuration of the dataset.
        split (`str`): the split. A folder that holds one saved `Dataset` has no others.
        streaming (`bool`): read it as it comes.
        data_files (`str`, `list` or `dict`, *optional*): which files to read, as for `datasets.load_dataset`.

    Raises:
        `ValueError`: if it cannot be found or loaded, saying what was tried, or if the split is empty.
    """
    import datasets

    place = Path(path).expanduser()
    saved = (place / "state.json").exists() or (place / "dataset_dict.json").exists()
    options: dict[str, Any] = {"name": name, "split": split, "streaming": streaming, "data_files": data_files}
    if place.is_file():
        if place.suffix not in FILE_KINDS:
            raise ValueError(f"The dataset {path!r} is a file of none of the kinds {', '.join(FILE_KINDS)}.")
        taken_as, path = f"a file of kind {FILE_KINDS[place.suffix]}", FILE_KINDS[place.suffix]
        options |= {"name": None, "data_files": str(place)}
    elif place.is_dir():
        taken_as, path = "a folder" + " written by `save_to_disk`" * saved, str(place)
    elif data_files is None and not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", path):
        raise ValueError(f"The dataset {path!r} is no file or folder here, and cannot be a Hub id.")
    else:
        taken_as = "a dataset of the Hub, as no file or folder has this name"
    try:
        dataset = _load_saved(place, split, streaming) if saved else datasets.load_dataset(path, **options)
    except Exception as error:  # datasets raises some thirty kinds
        message = f"Cannot load the split {split!r} of the dataset {str(place)!r} ({taken_as}): {error}"
        raise ValueError(message) from error
    if not streaming and len(dataset) == 0:
        raise ValueError(f"The split {split!r} of the dataset {str(place)!r} is empty.")
    return dataset


def _load_saved(place: Path, split: str, streaming: bool) -> Any:
    import datasets

    saved = datasets.load_from_disk(str(place))
    if isinstance(saved, datasets.DatasetDict):
        if split not in saved:
            raise ValueError(f"it has the splits {', '.join(saved)}.")
        saved = saved[split]
    return saved.to_iterable_dataset() if streaming else saved


def prepare_dataset(
    dataset: Any,
    spec: ImageSpec,
    *,
    image_column: str | None = None,
    label_column: str | None = None,
    on_bad_image: Literal["error", "skip"] = "error",
    num_classes: int | None = None,
) -> Dataset[dict[str, Tensor]]:
    """A torch dataset of `{"images": (channels, height, width), "class_labels": ()}`, checked on its first item.

    Args:
        dataset: a dataset of `datasets` (streaming or not), a tensor of shape `(n, channels, height, width)` in the
            network's range, or a torch dataset of such images or PIL images, of `(image, label)` or of dicts.
        spec ([`ImageSpec`]): what the network takes.
        image_column (`str`, *optional*): found by itself when there is one candidate.
        label_column (`str`, *optional*): class labels, whole numbers. Columns need it; torch datasets show theirs.
        on_bad_image (`str`): what an image does that cannot be read or is not finite. `"error"` stops, naming it;
            `"skip"` warns, once, and takes the next good one in its place (in a stream, leaves it out).
        num_classes (`int`, *optional*): of a class-conditional network, which needs a label below it for every image.

    Raises:
        `TypeError`: if `dataset` is none of these.
        `ValueError`: if it is empty, a column is missing, a label of a column is out of range, or its first image or
            label does not fit.
    """
    if on_bad_image not in ("error", "skip"):
        raise ValueError(f"`on_bad_image` must be 'error' or 'skip', got {on_bad_image!r}.")
    if isinstance(dataset, Tensor):
        if dataset.ndim != 4:
            raise ValueError(f"A tensor of images must be (n, channels, height, width), got {tuple(dataset.shape)}.")
        bad = dataset.flatten(1).isfinite().all(1).logical_not().nonzero()
        if len(bad) and on_bad_image == "error":
            raise ValueError(f"The image of row {int(bad[0])} holds values that are not finite.")
        dataset = TensorDataset(dataset)
    # A dataset with a transform of the user's gives what the transform makes, whatever its columns are.
    transformed = (getattr(dataset, "format", None) or {}).get("type") == "custom"
    is_column_data = hasattr(dataset, "column_names") and not transformed
    streamed = isinstance(dataset, IterableDataset) or (is_column_data and not hasattr(dataset, "__len__"))
    if not streamed and not (hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")):
        raise TypeError(f"`dataset` must be a dataset or a tensor of images, got {type(dataset).__name__}.")
    if not streamed and len(dataset) == 0:
        raise ValueError("The dataset is empty.")
    if is_column_data:
        dataset, image_column, label_column = _select_columns(dataset, image_column, label_column, num_classes)
        if not streamed and label_column is not None and num_classes is not None:
            _check_label_column(dataset, label_column, num_classes)
    transform = ImageTransform(spec, image_column, label_column, num_classes)
    make: Any = StreamedImages if streamed else MappedImages
    prepared: Dataset[dict[str, Tensor]] = make(dataset, transform, skip_bad=on_bad_image == "skip")
    prepared.check_first()  # type: ignore[attr-defined]
    return prepared


def _select_columns(
    dataset: Any, image_column: str | None, label_column: str | None, num_classes: int | None
) -> tuple[Any, str, str | None]:
    """Find the columns, and leave the decoding of images to us, so that a corrupt one can be named."""
    import datasets

    features = dataset.features or {}
    names = list(dataset.column_names or features or next(iter(dataset), {}))
    if not names:
        raise ValueError("The dataset is empty.")
    if image_column is None:
        image_column = _find_image_column(names, features)
    for role, column in (("image", image_column), ("label", label_column)):
        if column is not None and column not in names:
            near = difflib.get_close_matches(column, names, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"The dataset has no {role} column {column!r}; it has {', '.join(names)}.{hint}")
    if num_classes is not None and label_column is None:
        raise ValueError(f"The network is class-conditional: set `label_column` to one of {', '.join(names)}.")
    dataset = dataset.with_format(None)
    if isinstance(features.get(image_column), datasets.Image):
        dataset = dataset.cast_column(image_column, datasets.Image(decode=False))
    columns = [image_column] + ([label_column] if label_column is not None else [])
    return dataset.select_columns(columns), image_column, label_column


def _find_image_column(names: Sequence[str], features: Any) -> str:
    import datasets

    images = [name for name in names if isinstance(features.get(name), datasets.Image)]
    candidates = images or [name for name in names if name in IMAGE_COLUMNS]
    if len(candidates) != 1:
        found = "none" if not candidates else ", ".join(candidates)
        raise ValueError(f"Set `image_column`: of the columns {', '.join(names)}, these hold images: {found}.")
    return candidates[0]


def _check_label_column(dataset: Any, column: str, num_classes: int) -> None:
    """Labels are cheap to read: one that is out of range is found now, not hours into training."""
    for row, label in enumerate(dataset.select_columns([column])[:][column]):
        check_label(label, num_classes, f"row {row}, column {column!r}")


# Datasets --------------------------------------------------------------------------------------------------------


class _Images:
    """What both kinds of datasets share: reading one item, and what a bad one does."""

    def __init__(self, dataset: Any, transform: ImageTransform, skip_bad: bool) -> None:
        self.dataset, self.transform, self.skip_bad = dataset, transform, skip_bad
        self._bad: set[int] = set()

    def _read_or_skip(self, index: int, raw: Any, name: str) -> dict[str, Tensor] | None:
        try:
            return self.transform.read(raw, name)
        except BadImage as error:
            if not self.skip_bad:
                raise
            if index not in self._bad:
                logger.warning("%s It is skipped.", error)
            self._bad.add(index)
            return None


class MappedImages(_Images, Dataset[dict[str, Tensor]]):
    """A dataset with a length. A bad image is replaced by the next good one when it may be skipped."""

    def __init__(self, dataset: Any, transform: ImageTransform, skip_bad: bool) -> None:
        super().__init__(dataset, transform, skip_bad)
        fits = len(dataset) * math.prod(transform.spec.shape) * 4 <= CACHE_BYTES and transform.spec.center_crop
        # Only columns are known to give the same image every time, and to need decoding.
        self._cache: dict[int, dict[str, Tensor]] | None = {} if fits and hasattr(dataset, "column_names") else None

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int | tuple[int, int]) -> dict[str, Tensor]:
        """Row `index`, cropped and flipped by torch's global generator, or by the seed in `(index, seed)`."""
        row, seed = index if isinstance(index, tuple) else (index, None)
        if not -len(self) <= row < len(self):
            raise IndexError(f"The dataset has {len(self)} images; there is no row {row}.")
        rng = None if seed is None else torch.Generator().manual_seed(seed)
        return self.transform.augment(self._next_good(row % len(self)), rng)

    def check_first(self) -> None:
        """Raise what the first image has against it."""
        self._next_good(0)

    def _next_good(self, index: int) -> dict[str, Tensor]:
        tries = min(len(self), MOST_BAD_IN_A_ROW)
        for row in range(index, index + tries):
            if (item := self._read(row % len(self))) is not None:
                return item
        raise ValueError(f"None of the {tries} images from row {index} on can be read.")

    def _read(self, row: int) -> dict[str, Tensor] | None:
        if self._cache is not None and row in self._cache:
            return self._cache[row]
        item = None if row in self._bad else self._read_or_skip(row, self.dataset[row], f"row {row}")
        if self._cache is not None and item is not None:
            self._cache[row] = item
        return item


class StreamedImages(_Images, IterableDataset[dict[str, Tensor]]):
    """A dataset that comes one by one. Bad images are left out when they may be skipped."""

    def __init__(self, dataset: Any, transform: ImageTransform, skip_bad: bool) -> None:
        super().__init__(dataset, transform, skip_bad)
        self._held: list[Any] = []
        self._seed = 0
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # seen by workers that live for many epochs

    def set_epoch(self, epoch: int) -> None:
        """Other crops and flips for another epoch, and another order if the dataset has one."""
        self._epoch.fill_(epoch)
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)

    def shuffled(self, seed: int, buffer_size: int) -> StreamedImages:
        """The same images in another order, if this is a dataset of `datasets`; others keep the order they come in."""
        result = copy.copy(self)
        result._seed = seed
        if hasattr(self.dataset, "column_names"):
            result.dataset = self.dataset.shuffle(seed=seed, buffer_size=buffer_size)
        return result

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        held, self._held = self._held, []
        worker = get_worker_info()
        rng = seeded_generator(self._seed, int(self._epoch), 0 if worker is None else worker.id)
        for item in self._good(itertools.chain(held, self.dataset)):
            yield self.transform.augment(item, rng)

    def check_first(self) -> None:
        """Raise what the first image has against it. Nothing is lost, even of a stream that can be read only once."""
        stream = iter(self.dataset)
        taken: list[Any] = []
        first = next(self._good(taken.append(raw) or raw for raw in stream), None)  # type: ignore[func-returns-value]
        if first is None:
            raise ValueError("The dataset is empty, or holds no image that can be read.")
        if iter(self.dataset) is stream:
            self._held = taken

    def _good(self, stream: Iterable[Any]) -> Iterator[dict[str, Tensor]]:
        in_a_row = 0
        for index, raw in enumerate(stream):
            item = self._read_or_skip(index, raw, f"item {index} of the stream")
            in_a_row = in_a_row + 1 if item is None else 0
            if in_a_row == MOST_BAD_IN_A_ROW:
                raise ValueError(f"None of {in_a_row} images in a row, up to item {index} of the stream, can be read.")
            if item is not None:
                yield item


class SeededSampler(Sampler[tuple[int, int]]):
    """Every row once, each with a seed for its crop and flip. Both depend on the seed and the epoch alone.

    So an image is the same in whichever process, worker or resumed run it is read. Each pass over it is an epoch. The
    order is that of accelerate's seedable sampler.
    """

    def __init__(self, length: int, seed: int, shuffle: bool) -> None:
        self.length, self.seed, self.shuffle, self.epoch = length, seed, shuffle, 0

    def __len__(self) -> int:
        return self.length

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[tuple[int, int]]:
        rng = torch.Generator().manual_seed(self.seed + self.epoch)
        rows = torch.randperm(self.length, generator=rng) if self.shuffle else torch.arange(self.length)
        seeds = torch.randint(2**62, (self.length,), generator=rng)
        yield from zip(rows.tolist(), seeds.tolist(), strict=True)
        self.epoch += 1


def seeded_generator(*numbers: int) -> torch.Generator:
    """A generator of its own for every tuple of whole numbers."""
    sequence = np.random.SeedSequence([number % 2**64 for number in numbers])
    return torch.Generator().manual_seed(int(sequence.generate_state(1, np.uint64)[0]))


def make_dataloader(
    dataset: Dataset[dict[str, Tensor]],
    *,
    batch_size: int,
    shuffle: bool,
    num_workers: int = 0,
    seed: int = 0,
    drop_last: bool = True,
) -> DataLoader[dict[str, Tensor]]:
    """Batches of a prepared dataset. Order, crops and flips depend on `seed` and on the epoch.

    A stream of `datasets` is shuffled in a buffer, by `seed` and its `set_epoch`; another comes in its own order. Each
    worker has its own part of a stream, so that their number matters there.

    Raises:
        `ValueError`: if the dataset is too small for a single batch.
    """
    if isinstance(dataset, StreamedImages):
        if shuffle:
            dataset = dataset.shuffled(seed, buffer_size=max(1000, 10 * batch_size))
        sampler = None
    elif drop_last and len(dataset) < batch_size:  # type: ignore[arg-type]
        size = len(dataset)  # type: ignore[arg-type]
        raise ValueError(f"The dataset's {size} images are fewer than one batch: `batch_size` is {batch_size}.")
    else:
        sampler = SeededSampler(len(dataset), seed, shuffle)  # type: ignore[arg-type]
    return DataLoader(
        dataset,
        batch_size=batch_size,
        sampler=sampler,
        num_workers=num_workers,
        drop_last=drop_last,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=num_workers > 0,
        generator=torch.Generator().manual_seed(seed),
    )


def started(loader: Iterable[Any]) -> Iterator[Any]:
    """The batches of `loader`, whose start, with or without workers, takes nothing from torch's global generator.

    A loader may draw the seed of its workers from it; a run that is resumed within an epoch would then draw once more.
    """
    batches = iter(loader)
    with torch.random.fork_rng(devices=[]):
        first = next(batches, None)
    if first is not None:
        yield first
        yield from batches
