"""The images that samples are compared with, and their features, computed once."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm.auto import tqdm

from cm_diffusers.evaluation.features import Features, check_features
from cm_diffusers.evaluation.metrics import evenly_spread
from cm_diffusers.evaluation.sampling import eight_bits
from cm_diffusers.evaluation.sharing import map_shared
from cm_diffusers.training.runtime import on_main

logger = logging.getLogger(__name__)

# Kept features are those of the network at hand if they differ by no more than other hardware makes them.
TOLERANCE = 0.01


@dataclass(frozen=True)
class Reference:
    """Real images in eight bits.

    Args:
        images (`Tensor` of shape `(n, channels, height, width)`): in uint8.
        name (`str`): what they are.
    """

    images: Tensor
    name: str

    @cached_property
    def digest(self) -> str:
        """Of the pixels."""
        digest = hashlib.sha256(str(tuple(self.images.shape)).encode())
        for part in self.images.split(1000):
            digest.update(part.contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

    @classmethod
    def from_dataset(
        cls, dataset: Any, name: str, limit: int | None = None, features: Features | None = None
    ) -> Reference:
        """Up to `limit` images of a prepared dataset, spread evenly over it (of a stream, the first), or all.

        Images that cannot be read are left out where the dataset skips them.

        Args:
            dataset: as [`~cm_diffusers.training.data.prepare_dataset`] makes it, cropped in the middle, not flipped.
            features ([`~cm_diffusers.evaluation.features.Features`], *optional*): on the device of this process; tried
                on the first two images before the others are read.

        Raises:
            `ValueError`: if it is a stream, and there is no limit; if the limit is below 1; if nothing can be read; if
                the images do not fit the features.
        """
        if limit is not None and limit < 1:
            raise ValueError(f"The number of reference images must be at least 1, got {limit}.")
        spec = dataset.transform.spec
        streamed = not hasattr(dataset, "__len__")
        if streamed and limit is None:
            raise ValueError("A stream has no end that is known: set the number of reference images.")
        items = itertools.islice(dataset, limit) if streamed else _readable(dataset, limit or len(dataset))
        images: list[Tensor] = []
        with tqdm(items, total=limit, desc="reading the reference", leave=False) as bar:
            for item in bar:
                images.append(eight_bits(item["images"], spec.value_range))
                if features is not None and len(images) == 2:
                    check_features(features, torch.stack(images).to(PartialState().device))
        if not images:
            raise ValueError("None of the reference images can be read.")
        return cls(torch.stack(images), name)


def _readable(dataset: Any, count: int) -> Iterator[dict[str, Tensor]]:
    """Up to `count` items, spread evenly, without those that the dataset puts in the place of bad ones."""
    for row in evenly_spread(len(dataset), count).tolist():
        item = dataset[row]
        if row not in getattr(dataset, "_bad", ()):
            yield item


def extract(features: Features, images: Tensor, batch_size: int) -> Tensor:
    """Features of images in uint8, shared out over all processes; the same on each."""
    device = PartialState().device

    def work(rows: Sequence[int]) -> tuple[Tensor]:
        return (features(images[list(rows)].to(device))[0],)

    return map_shared(len(images), batch_size, work, "features of the reference")[0]


def cache_folder() -> Path:
    """Where features of references are kept: `CM_DIFFUSERS_CACHE`, or `~/.cache/cm_diffusers`."""
    place = os.environ.get("CM_DIFFUSERS_CACHE") or Path.home() / ".cache" / "cm_diffusers"
    return Path(place) / "reference"


def reference_features(features: Features, reference: Reference, batch_size: int) -> Tensor:
    """The reference's features, from the cache if the same network has seen the same pixels before.

    Called by all processes; only the main one reads and writes the cache, and has the result: the others' is empty.

    Raises:
        `ValueError`: if the processes have other images or another network.
    """
    state = PartialState()
    known: list[str] = gather_object([f"{features.name} {features.digest} {reference.digest}"])
    if len(set(known)) > 1:
        raise ValueError("The processes do not have the same reference images and feature network.")
    file = cache_folder() / f"{hashlib.sha256(known[0].encode()).hexdigest()[:32]}.safetensors"
    found = torch.empty(0)

    def look() -> bool:
        nonlocal found
        found = _kept(file, features, reference.images, batch_size)
        return len(found) > 0

    if not on_main(state, look):
        found = extract(features, reference.images, batch_size)
        if state.is_main_process:
            _keep(found, file)
    return found if state.is_main_process else torch.empty(0)


def _kept(file: Path, features: Features, images: Tensor, batch_size: int) -> Tensor:
    """The features in `file`; none if they are not what the network gives now, judged by the first batch."""
    none = torch.empty(0)
    try:
        kept: Tensor = load_file(file)["features"]
    except FileNotFoundError:
        return none
    except (OSError, KeyError, SafetensorError) as error:
        logger.warning("%s cannot be read and is made anew: %s", file, error)
        return none
    now = features(images[:batch_size].to(PartialState().device))[0].cpu()
    same = kept.shape == (len(images), now.shape[1])
    if same and (kept[: len(now)] - now).norm() <= TOLERANCE * now.norm():
        return kept
    logger.warning("%s is not what the network gives now, and is made anew.", file)
    return none


def _keep(found: Tensor, file: Path) -> None:
    """Write features to `file`, or say why that is not possible."""
    partial = file.with_suffix(f".{os.getpid()}.partial")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file({"features": found.contiguous()}, partial)
        os.replace(partial, file)
    except (OSError, SafetensorError) as error:
        logger.warning("The features of the reference cannot be kept in %s: %s", file.parent, error)
        with contextlib.suppress(OSError):
            partial.unlink()
