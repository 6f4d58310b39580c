"""Images for training: from a `datasets` dataset, a folder, the Hub, or tensors, to batches in the model's range."""

from __future__ import annotations

import difflib
import io
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

logger = logging.getLogger(__name__)

IMAGE_COLUMNS = ("image", "img", "images", "jpg", "png", "webp")
LABEL_COLUMNS = ("class_labels", "label", "labels")
PIL_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
# Decoded images are kept in memory when all of them fit in so many bytes: small images cost more to decode than to
# train on.
CACHE_BYTES = 256 * 2**20


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

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.channels, self.height, self.width


class BadImage(ValueError):
    """An image that cannot be used; the message names it."""


# Loading ---------------------------------------------------------------------------------------------------------


def load_image_dataset(path: str, name: str | None = None, split: str = "train", streaming: bool = False) -> Any:
    """A dataset of `datasets`.

    Args:
        path (`str`): a Hub id; a folder of images (with a folder per class, or `metadata.jsonl`), of parquet files, or
            written by `save_to_disk`; or one parquet, arrow or json file.
        name (`str`, *optional*): configuration of the dataset.
        split (`str`): the split.
        streaming (`bool`): read it as it comes.

    Raises:
        `ValueError`: if it cannot be loaded, saying why.
    """
    import datasets

    place = Path(path)
    try:
        if (place / "dataset_info.json").exists() or (place / "dataset_dict.json").exists():
            saved = datasets.load_from_disk(path)
            return saved[split] if isinstance(saved, datasets.DatasetDict) else saved
        if place.is_file():
            kind = {".jsonl": "json", ".arrow": "arrow", ".json": "json"}.get(place.suffix, "parquet")
            return datasets.load_dataset(kind, data_files=str(place), split=split, streaming=streaming)
        if place.is_dir() and not any(place.rglob("*.parquet")):
            return datasets.load_dataset("imagefolder", name, data_dir=path, split=split, streaming=streaming)
        return datasets.load_dataset(path, name, split=split, streaming=streaming)
    except Exception as error:  # datasets raises some thirty kinds
        raise ValueError(f"Cannot load the split {split!r} of the dataset {path!r}: {error}") from error


def prepare_dataset(
    dataset: Any,
    spec: ImageSpec,
    image_column: str | None = None,
    label_column: str | None = None,
    on_bad_image: str = "error",
    num_classes: int | None = None,
) -> Dataset[dict[str, Tensor]]:
    """A torch dataset of `{"images": (channels, height, width), "class_labels": ()}`, checked on its first item.

    Args:
        dataset: a dataset of `datasets` (streaming or not), a tensor of shape `(n, channels, height, width)` in the
            model's range, or a torch dataset of such images, of `(image, label)` or of dicts.
        spec ([`ImageSpec`]): what the network takes.
        image_column (`str`, *optional*): found by itself when there is one candidate.
        label_column (`str`, *optional*): class labels; needed for class-conditional networks.
        on_bad_image (`str`): `"error"` stops at an image that cannot be read, naming it; `"skip"` warns and goes on
            with the next.
        num_classes (`int`, *optional*): of a class-conditional network.

    Raises:
        `TypeError`: if `dataset` is none of these.
        `ValueError`: if it is empty, a column is missing, or its first image or label does not fit.
    """
    if isinstance(dataset, Tensor):
        if dataset.ndim != 4:
            raise ValueError(f"A tensor of images must be (n, channels, height, width), got {tuple(dataset.shape)}.")
        dataset = TensorDataset(dataset)
    is_column_data = hasattr(dataset, "column_names")
    streamed = isinstance(dataset, IterableDataset) or (is_column_data and not hasattr(dataset, "__len__"))
    if not streamed and not (hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")):
        raise TypeError(f"`train_dataset` must be a dataset or a tensor, got {type(dataset).__name__}.")
    if not streamed and len(dataset) == 0:
        raise ValueError("The dataset is empty.")
    if is_column_data:
        dataset, image_column, label_column = _select_columns(dataset, image_column, label_column, num_classes)
    reader = ItemReader(spec, image_column, label_column, num_classes)
    if streamed:
        prepared: Any = StreamedImages(dataset, reader, on_bad_image == "skip")
        first = next(iter(prepared), None)
    else:
        prepared = MappedImages(dataset, reader, on_bad_image == "skip")
        first = prepared[0]
    if first is None:
        raise ValueError("The dataset is empty, or holds no image that can be read.")
    result: Dataset[dict[str, Tensor]] = prepared
    return result


def _select_columns(
    dataset: Any, image_column: str | None, label_column: str | None, num_classes: int | None
) -> tuple[Any, str, str | None]:
    """Find the columns, and leave the decoding of images to us, so that a corrupt one can be named."""
    import datasets

    features = dataset.features or {}
    names = list(dataset.column_names or features or next(iter(dataset), {}))
    if image_column is None:
        image_column = _find_image_column(names, features)
    for role, column in (("image", image_column), ("label", label_column)):
        if column is not None and column not in names:
            near = difflib.get_close_matches(column, names, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"The dataset has no {role} column {column!r}; it has {', '.join(names)}.{hint}")
    if num_classes is not None and label_column is None:
        raise ValueError(f"The network is class-conditional: set `label_column` to one of {', '.join(names)}.")
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


# One item --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ItemReader:
    """Turns an item of any dataset into tensors."""

    spec: ImageSpec
    image_column: str | None
    label_column: str | None
    num_classes: int | None

    def read(self, item: Any, name: str) -> dict[str, Tensor]:
        """The item called `name` as `{"images": ..., "class_labels": ...}`, before random crops and flips.

        Raises:
            `BadImage`: if its image cannot be read.
            `ValueError`: if its label does not fit.
        """
        image, label = self._split(item)
        result = {"images": self._image(image, name)}
        if self.num_classes is not None:
            result["class_labels"] = self._label(label, name)
        return result

    def _split(self, item: Any) -> tuple[Any, Any]:
        if isinstance(item, dict):
            image_column = self.image_column or next((c for c in IMAGE_COLUMNS if c in item), None)
            label_column = self.label_column or next((c for c in LABEL_COLUMNS if c in item), None)
            if image_column is None:
                raise ValueError(f"Items must hold one of {', '.join(IMAGE_COLUMNS)}; they hold {', '.join(item)}.")
            return item[image_column], None if label_column is None else item[label_column]
        if isinstance(item, tuple | list):
            return item[0], item[1] if len(item) > 1 else None
        return item, None

    def _label(self, label: Any, name: str) -> Tensor:
        if label is None:
            raise ValueError(f"The network is class-conditional, but {name} has no label.")
        if not 0 <= int(label) < (self.num_classes or 0):
            raise ValueError(
                f"The label of {name} is {int(label)}; the network knows 0 to {(self.num_classes or 0) - 1}."
            )
        return torch.tensor(int(label))

    def _image(self, image: Any, name: str) -> Tensor:
        if isinstance(image, Tensor):
            if tuple(image.shape) != self.spec.shape:
                raise BadImage(
                    f"Image {name} has the shape {tuple(image.shape)}; the network takes {self.spec.shape}."
                )
            tensor = image.float()
        else:
            tensor = picture_to_tensor(_open(image, name), self.spec, name)
        if not torch.isfinite(tensor).all():
            raise BadImage(f"Image {name} holds values that are not finite.")
        return tensor


def _open(image: Any, name: str) -> Any:
    """A PIL image from what `datasets` stores (bytes and path), an array or a PIL image."""
    from PIL import Image, UnidentifiedImageError

    try:
        if isinstance(image, dict):
            name = image.get("path") or name
            image = Image.open(io.BytesIO(image["bytes"]) if image.get("bytes") is not None else image["path"])
        elif isinstance(image, bytes):
            image = Image.open(io.BytesIO(image))
        elif isinstance(image, str | Path):
            image = Image.open(image)
        elif isinstance(image, list | np.ndarray):
            image = Image.fromarray(np.asarray(image, dtype=np.uint8))
        image.load()
        return image
    except (OSError, UnidentifiedImageError, SyntaxError, ValueError, TypeError, AttributeError, KeyError) as error:
        raise BadImage(f"Image {name} cannot be read: {error}") from error


def picture_to_tensor(picture: Any, spec: ImageSpec, name: str = "") -> Tensor:
    """A PIL image in the network's colours and value range, its shorter side resized to fit; cropped if by the middle.

    Args:
        picture (`PIL.Image.Image`): of any mode; transparency is laid on white, rotation tags are followed.
        spec ([`ImageSpec`]): what the network takes.
        name (`str`): for messages.

    Returns:
        `Tensor` of shape `(channels, height, width)`, or larger if it is still to be cropped at random.
    """
    from PIL import Image, ImageOps

    if spec.channels not in PIL_MODES:
        raise BadImage(f"Image {name} is a picture; a network of {spec.channels} channels takes tensors.")
    picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith("I") or picture.mode == "F":  # 16 bits and more: PIL would cut them off
        array = np.asarray(picture, dtype=np.float32)
        picture = Image.fromarray((array / (257 if array.max() > 255 else 1)).clip(0, 255).astype(np.uint8))
    if spec.channels != 4 and (picture.mode in ("LA", "PA", "RGBA") or "transparency" in picture.info):
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture.convert("RGBA"))
    picture = picture.convert(PIL_MODES[spec.channels])
    scale = max(spec.width / picture.width, spec.height / picture.height)
    size = max(spec.width, round(picture.width * scale)), max(spec.height, round(picture.height * scale))
    if size != picture.size:
        picture = picture.resize(size, Image.Resampling.LANCZOS)
    if spec.center_crop:
        left, top = (picture.width - spec.width) // 2, (picture.height - spec.height) // 2
        picture = picture.crop((left, top, left + spec.width, top + spec.height))
    low, high = spec.value_range
    pixels = torch.from_numpy(np.array(picture, dtype=np.float32)).reshape(
        picture.height, picture.width, spec.channels
    )
    return pixels.permute(2, 0, 1).contiguous() * ((high - low) / 255) + low


def augment(image: Tensor, spec: ImageSpec) -> Tensor:
    """Random crop and flip, by torch's global generator."""
    height, width = image.shape[-2:]
    if (height, width) != (spec.height, spec.width):
        top = int(torch.randint(height - spec.height + 1, ()))
        left = int(torch.randint(width - spec.width + 1, ()))
        image = image[:, top : top + spec.height, left : left + spec.width]
    if spec.random_flip and torch.rand(()) < 0.5:
        image = image.flip(-1)
    return image.contiguous()


# Datasets --------------------------------------------------------------------------------------------------------


class MappedImages(Dataset[dict[str, Tensor]]):
    """A dataset with a length. A bad image is replaced by the next good one when it may be skipped."""

    def __init__(self, dataset: Any, reader: ItemReader, skip_bad: bool) -> None:
        self.dataset, self.reader, self.skip_bad = dataset, reader, skip_bad
        fits = len(dataset) * math.prod(reader.spec.shape) * 4 <= CACHE_BYTES and reader.spec.center_crop
        self._cache: dict[int, dict[str, Tensor]] | None = {} if fits else None

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        for offset in range(len(self)):
            try:
                item = self._read((index + offset) % len(self))
            except BadImage as error:
                if not self.skip_bad:
                    raise
                logger.warning("%s It is skipped.", error)
            else:
                return item | {"images": augment(item["images"], self.reader.spec)}
        raise ValueError("The dataset holds no image that can be read.")

    def _read(self, index: int) -> dict[str, Tensor]:
        if self._cache is None:
            return self.reader.read(self.dataset[index], f"{index}")
        if index not in self._cache:
            self._cache[index] = self.reader.read(self.dataset[index], f"{index}")
        return self._cache[index]


class StreamedImages(IterableDataset[dict[str, Tensor]]):
    """A dataset that comes one by one. Bad images are left out when they may be skipped."""

    def __init__(self, dataset: Any, reader: ItemReader, skip_bad: bool) -> None:
        self.dataset, self.reader, self.skip_bad = dataset, reader, skip_bad

    def set_epoch(self, epoch: int) -> None:
        """Another order for another epoch, if the dataset has one."""
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for index, raw in enumerate(self.dataset):
            try:
                item = self.reader.read(raw, f"{index} of the stream")
            except BadImage as error:
                if not self.skip_bad:
                    raise
                logger.warning("%s It is skipped.", error)
                continue
            yield item | {"images": augment(item["images"], self.reader.spec)}


def make_dataloader(
    dataset: Dataset[dict[str, Tensor]],
    batch_size: int,
    shuffle: bool,
    num_workers: int = 0,
    seed: int = 0,
    drop_last: bool = True,
) -> DataLoader[dict[str, Tensor]]:
    """Batches of a prepared dataset. The order depends on `seed` and on the epoch only.

    A streamed dataset is shuffled in a buffer of its own if it can be.
    """
    if isinstance(dataset, StreamedImages):
        if shuffle and hasattr(dataset.dataset, "shuffle"):
            shuffled = dataset.dataset.shuffle(seed=seed, buffer_size=max(1000, 10 * batch_size))
            dataset = StreamedImages(shuffled, dataset.reader, dataset.skip_bad)
        shuffle = False
    return DataLoader(
        dataset,
        batch_size=batch_size,
        shuffle=shuffle,
        num_workers=num_workers,
        drop_last=drop_last,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=num_workers > 0,
        generator=torch.Generator().manual_seed(seed),
    )
