"""The images that samples are compared with, and their features, computed once."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm.auto import tqdm

from cm_diffusers.evaluation.features import Features
from cm_diffusers.evaluation.sampling import eight_bits
from cm_diffusers.evaluation.sharing import map_shared

logger = logging.getLogger(__name__)


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
    def from_dataset(cls, dataset: Any, name: str, limit: int | None = None) -> Reference:
        """The first `limit` images of a prepared dataset, or all.

        Args:
            dataset: as [`~cm_diffusers.training.data.prepare_dataset`] makes it, cropped in the middle, not flipped.

        Raises:
            `ValueError`: if it is a stream, and there is no limit.
        """
        spec = dataset.transform.spec
        streamed = not hasattr(dataset, "__len__")
        if streamed and limit is None:
            raise ValueError("A stream has no end that is known: set the number of reference images.")
        images: list[Tensor] = []
        items = dataset if streamed else (dataset[row] for row in range(len(dataset)))
        total = limit if streamed else min(limit or len(dataset), len(dataset))
        for item in tqdm(items, total=total, desc="reading the reference", leave=False):
            images.append(eight_bits(item["images"], spec.value_range))
            if len(images) == total:
                break
        return cls(torch.stack(images), name)


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

    Called by all processes; the main one writes.
    """
    key = hashlib.sha256(f"{features.name} {features.digest} {reference.digest}".encode()).hexdigest()[:32]
    file = cache_folder() / f"{key}.safetensors"
    try:
        return load_file(file)["features"]
    except (OSError, KeyError, SafetensorError) as error:
        if file.exists():
            logger.warning("%s cannot be read and is made anew: %s", file, error)
    found = extract(features, reference.images, batch_size)
    if PartialState().is_main_process:
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(f".{os.getpid()}.partial")
        save_file({"features": found.contiguous()}, partial)
        os.replace(partial, file)
    return found
