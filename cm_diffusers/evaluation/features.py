"""Networks whose features images are compared by."""

from __future__ import annotations

import hashlib
import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cm_diffusers.evaluation.digests import network_digest

INCEPTION_URL = (
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"
)
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"


@dataclass(frozen=True)
class Features:
    """A feature network, and what has to be said of it beside every figure.

    Args:
        network (`nn.Module`): takes images of shape `(batch, 3 or 1, height, width)` in uint8, 0 to 255, and gives
            features of shape `(batch, d)`, or a pair of features and a classifier's logits.
        name (`str`): names the network, and how it resizes images.
    """

    network: nn.Module
    name: str

    @cached_property
    def digest(self) -> str:
        """Of the weights and, where it can be had, the source of the network's class.

        Others under the same name are another protocol.
        """
        try:
            source = inspect.getsource(type(self.network))
        except (OSError, TypeError):  # of a class made in an interactive session, for instance
            source = ""
        return network_digest(self.network, source)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Features and, if the network has them, logits, in float32.

        Raises:
            `TypeError`: for images that are not uint8, or a network that gives something else.
            `ValueError`: for features without a dimension of their own.
        """
        if images.dtype != torch.uint8 or images.ndim != 4:
            raise TypeError(f"Images must be (batch, channels, height, width) in uint8, got {images.dtype}.")
        found = self.network(images)
        features, logits = found if isinstance(found, tuple) and len(found) == 2 else (found, None)
        if not isinstance(features, Tensor) or not isinstance(logits, Tensor | None):
            form = type(found).__name__
            raise TypeError(f"A feature network must give features, or a pair of them and logits, got a {form}.")
        if features.ndim < 2:
            raise ValueError(f"Features must be of shape (batch, d), got {tuple(features.shape)}.")
        return features.flatten(1).float(), None if logits is None else logits.float()


def check_features(features: Features, images: Tensor) -> None:
    """Try a feature network on a few images, before anything is built on it. No random numbers are used up.

    Args:
        features ([`Features`]): to be tried.
        images (`Tensor` of shape `(n, channels, height, width)`): in uint8, on the network's device.

    Raises:
        `ValueError`: if the network fails on them, or gives anything but a row of finite features, and of logits if it
            has any, for each.
    """
    refusal = f"The features {features.name!r} do not fit images of shape {tuple(images.shape[1:])}"
    try:
        with torch.random.fork_rng([images.device] if images.is_cuda else []):
            found = features(images)
    except Exception as error:  # a network of the user's fails in any way
        (reason, *_) = str(error).splitlines() or [type(error).__name__]
        raise ValueError(f"{refusal}: {reason}") from error
    for name, part in zip(("features", "logits"), found, strict=True):
        if part is not None and (part.ndim != 2 or len(part) != len(images) or not part.shape[1]):
            raise ValueError(f"{refusal}: {len(images)} of them have {name} of shape {tuple(part.shape)}.")
    if not found[0].isfinite().all():
        raise ValueError(f"{refusal}: they are not finite.")


def load_features(source: Any, device: torch.device | str = "cpu") -> Features:
    """A feature network from whatever the user names.

    Args:
        source: `"inception"`, the Inception of the original FID with its TensorFlow weights and resizing (downloaded
            once); the path of a classifier saved by [`~cm_diffusers.evaluation.classifier.DomainClassifier`];
            `"package.module:function"`, which is called for a network; a network; or [`Features`].

    Raises:
        `ValueError`, `TypeError`: if it is none of these.
    """
    if isinstance(source, Features):
        features = source
    elif isinstance(source, nn.Module):
        features = Features(source, type(source).__name__)
    elif source == "inception":
        features = Features(
            Inception(_inception_weights()), "inception-v3-compat, TensorFlow's bilinear resize to 299"
        )
    elif isinstance(source, str | Path) and Path(source).is_dir():
        from cm_diffusers.evaluation.classifier import DomainClassifier

        features = Features(DomainClassifier.load(source), f"classifier {Path(source).name}")
    elif isinstance(source, str) and ":" in source:
        features = Features(_imported(source)(), source)
    else:
        raise ValueError(f"`features` must be 'inception', a classifier's folder, 'module:function' or a network, got "
                         f"{source!r}.")  # fmt: skip
    if not isinstance(features.network, nn.Module):
        raise TypeError(f"{source!r} must give a torch network, got {type(features.network).__name__}.")
    features.network.to(device).eval().requires_grad_(False)
    return features


def _imported(name: str) -> Callable[[], Any]:
    module, _, function = name.partition(":")
    try:
        found: Callable[[], Any] = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"`features` {name!r} cannot be imported: {error}") from error
    return found


class Inception(nn.Module):
    """Pool features and logits of the Inception of Heusel et al. 2017, from torch-fidelity; grey images become RGB.

    Args:
        weights (`Path`): its weights, as torch-fidelity publishes them.
    """

    def __init__(self, weights: Path) -> None:
        super().__init__()
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        except ImportError as error:
            raise ImportError(
                "Inception's features need torch-fidelity: pip install 'cm_diffusers[evaluation]'."
            ) from error
        self.network = FeatureExtractorInceptionV3("inception", ["2048", "logits_unbiased"], str(weights))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features, logits = self.network(images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images)
        return features, logits


def _inception_weights() -> Path:
    """The weights on this machine, known by their hash: torch-fidelity would run any code in another file."""
    place = Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_URL.rsplit("/", 1)[1]
    if not place.exists():
        place.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(INCEPTION_URL, str(place), hash_prefix=INCEPTION_SHA256)
        except (OSError, RuntimeError) as error:
            raise ValueError(f"Inception's weights cannot be had from {INCEPTION_URL}: {error}") from error
    found = hashlib.sha256(place.read_bytes()).hexdigest()
    if found != INCEPTION_SHA256:
        raise ValueError(f"{place} does not hold Inception's weights: its SHA-256 is {found}. Delete it.")
    return place
