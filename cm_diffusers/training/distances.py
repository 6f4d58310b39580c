"""Distances between two batches of images, one number per sample, in float32."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Distance = Callable[[Tensor, Tensor], Tensor]


def l1(x: Tensor, y: Tensor) -> Tensor:
    """Mean absolute difference, of shape `(batch,)`."""
    return (x - y).abs().flatten(1).mean(1)


def l2(x: Tensor, y: Tensor) -> Tensor:
    """Mean squared difference, of shape `(batch,)`, as in Song et al. 2023."""
    return (x - y).square().flatten(1).mean(1)


def pseudo_huber(x: Tensor, y: Tensor, c: float | None = None) -> Tensor:
    """`sqrt(||x - y||^2 + c^2) - c` with the norm over the whole sample (Song & Dhariwal 2023, equation 8).

    Args:
        x, y (`Tensor` of shape `(batch, ...)`): images.
        c (`float`, *optional*): where it turns from squared to linear; `0.00054 * sqrt(d)` for `d` values in a sample.
    """
    if c is None:
        c = default_huber_c(x[0].numel())
    squared = (x - y).square().flatten(1).sum(1)
    # The same number without the cancellation of two nearly equal terms.
    return squared / (torch.sqrt(squared + c**2) + c)


def huber(x: Tensor, y: Tensor, c: float) -> Tensor:
    """The mean over all values of `sqrt((x - y)^2 + c^2) - c` (Luo et al. 2023).

    Args:
        x, y (`Tensor` of shape `(batch, ...)`): images.
        c (`float`): where it turns from squared to linear.
    """
    squared = (x - y).square()
    return (squared / (torch.sqrt(squared + c**2) + c)).flatten(1).mean(1)


def default_huber_c(num_values: int) -> float:
    """c for samples of `num_values` values (Song & Dhariwal 2023, section 3.3)."""
    return 0.00054 * math.sqrt(num_values)


class LPIPS(nn.Module):
    """Learned perceptual distance (Zhang et al. 2018) with a VGG backbone, frozen.

    Images below 256 pixels are resized to 224, for which the backbone was trained; grey images become RGB.

    Args:
        value_range (`tuple[float, float]`): the values between which the images lie.

    Raises:
        `OSError`: if the backbone's weights are not here and cannot be downloaded.
    """

    def __init__(self, value_range: tuple[float, float] = (-1.0, 1.0)) -> None:
        super().__init__()
        import lpips

        try:
            network = lpips.LPIPS(net="vgg", verbose=False)
        except OSError as error:
            raise OSError(
                f"`distance='lpips'` needs the weights of VGG, which cannot be downloaded here: {error}. "
                "`distance='pseudo_huber'` with `weighting='inverse_gap'` needs none."
            ) from error
        self.network = network.eval().requires_grad_(False)
        self.value_range = value_range

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            distances: Tensor = self.network(self._prepare(x), self._prepare(y))
        return distances.flatten()

    def _prepare(self, images: Tensor) -> Tensor:
        low, high = self.value_range
        images = (images - low) * (2 / (high - low)) - 1
        if images.shape[1] == 1:
            images = images.expand(-1, 3, -1, -1)
        if images.shape[1] != 3:
            raise ValueError(f"LPIPS compares grey or RGB images, got {images.shape[1]} channels.")
        if images.shape[-1] < 256:
            images = F.interpolate(images, size=(224, 224), mode="bilinear")
        return images


def build_distance(
    name: str, huber_c: float | None, value_range: tuple[float, float], device: torch.device
) -> Distance:
    """The distance called `name`, ready for images on `device`."""
    if name == "lpips":
        return LPIPS(value_range).to(device)
    if name == "pseudo_huber":
        return lambda x, y: pseudo_huber(x, y, huber_c)
    if name == "huber":
        return lambda x, y: huber(x, y, huber_c or 1e-3)
    return {"l1": l1, "l2": l2}[name]
