"""What is known of an image that a consistency model completes (Song et al. 2023, algorithm 4).

An edit is an orthonormal change of basis and a mask over its coefficients: those that are known are put back after
each jump to a clean image. Pixels, the luma of colours and the means of patches are bases here; whatever has the two
methods of [`Basis`] is one, too, for instance Fourier's for a picture behind a known blur.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from cm_diffusers.pipelines.inputs import check_count

# Of red, green and blue in luma (ITU-R BT.601), as Song et al. 2023 have them.
LUMA_WEIGHTS = (0.2989, 0.5870, 0.1140)


class Basis(Protocol):
    """An orthonormal change of basis: lengths stay, and noise stays noise of the same size.

    Both methods answer on the device of what they are given; one that holds tensors may have `to(device)`, which
    returns it there. It may also have `into_range(images, low, high)`, which brings values between the two without
    changing what is known; where it has not, they are clipped.
    """

    def coefficients(self, images: Tensor) -> Tensor:
        """From images of shape `(batch, channels, height, width)`; of any shape that begins with the batch."""
        ...

    def images(self, coefficients: Tensor) -> Tensor:
        """The way back."""
        ...


# Bases --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pixels:
    """Each value of each pixel by itself."""

    def coefficients(self, images: Tensor) -> Tensor:
        return images

    def images(self, coefficients: Tensor) -> Tensor:
        return coefficients


@dataclass(frozen=True)
class Luma:
    """A pixel's luma, as the first of three coefficients, and what is left of its colour, as the others.

    Any two that complete the basis do, as only the first is ever known. The published code takes those of a QR
    decomposition; here, a reflection exchanges the first axis with that of luma, and is its own way back.
    """

    def coefficients(self, images: Tensor) -> Tensor:
        return reflect(images, LUMA_WEIGHTS, 1)

    def images(self, coefficients: Tensor) -> Tensor:
        return reflect(coefficients, LUMA_WEIGHTS, 1)

    def into_range(self, images: Tensor, low: float, high: float) -> Tensor:
        """Colours that cannot be shown at their luma become paler, pixel by pixel."""
        return shrink(images, luma(images), low, high, 1)

    @staticmethod
    def mask() -> Tensor:
        """Of a known luma, of shape `(1, 3, 1, 1)`."""
        return torch.tensor([True, False, False]).view(1, 3, 1, 1)


@dataclass(frozen=True)
class Patches:
    """The mean of a square patch, times its side, as the first coefficient, and what its pixels differ by.

    Coefficients have the shape `(batch, channels, factor ** 2, height / factor, width / factor)`. What completes the
    basis matters as little as for [`Luma`].

    Args:
        factor (`int`): pixels on a patch's side, at least 2; divides height and width.
    """

    factor: int

    def __post_init__(self) -> None:
        check_count("factor", self.factor, 2)

    def coefficients(self, images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        if height % self.factor or width % self.factor:
            raise ValueError(f"`factor={self.factor}` does not divide images of {height} x {width} pixels.")
        return reflect(self._patches(images), self._axis(), 2)

    def images(self, coefficients: Tensor) -> Tensor:
        return self._joined(reflect(coefficients, self._axis(), 2))

    def into_range(self, images: Tensor, low: float, high: float) -> Tensor:
        """Contrasts that cannot be shown around their mean become weaker, patch by patch."""
        patches = self._patches(images)
        return self._joined(shrink(patches, patches.mean(2, keepdim=True), low, high, 2))

    def mask(self) -> Tensor:
        """Of known means, of shape `(1, 1, factor ** 2, 1, 1)`."""
        return (torch.arange(self.factor**2) == 0).view(1, 1, -1, 1, 1)

    def _patches(self, images: Tensor) -> Tensor:
        return F.pixel_unshuffle(images, self.factor).unflatten(1, (-1, self.factor**2))

    def _joined(self, patches: Tensor) -> Tensor:
        return F.pixel_shuffle(patches.flatten(1, 2), self.factor)

    def _axis(self) -> tuple[float, ...]:
        return (1.0,) * self.factor**2


# What is known ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Known:
    """The known part of images.

    Args:
        coefficients (`Tensor` of shape `(batch, ...)`): of the images in the basis, in the model's range of values.
            What they are where they are not known does not matter.
        mask (`Tensor` of booleans, broadcast to the shape of `coefficients`): where they are known.
        basis ([`Basis`]): pixels, unless another is given.
    """

    coefficients: Tensor
    mask: Tensor
    basis: Basis = Pixels()

    def __post_init__(self) -> None:
        if not (self.coefficients.is_floating_point() or self.coefficients.is_complex()):
            raise TypeError(f"`coefficients` must be real or complex numbers, got {self.coefficients.dtype}.")
        if self.mask.dtype != torch.bool:
            raise TypeError(f"`mask` must be of booleans, got {self.mask.dtype}.")
        try:
            shape = torch.broadcast_shapes(self.mask.shape, self.coefficients.shape)
        except RuntimeError:
            shape = torch.Size()
        if shape != self.coefficients.shape:
            raise ValueError(
                f"`mask` of shape {tuple(self.mask.shape)} does not fit coefficients of shape "
                f"{tuple(self.coefficients.shape)}."
            )

    @classmethod
    def luma(cls, grey: Tensor) -> Known:
        """Images of red, green and blue whose luma is known.

        Args:
            grey (`Tensor` of shape `(batch, 1, height, width)`): the luma, in the model's range of values.
        """
        # Any images of that luma do.
        return cls(Luma().coefficients(grey.expand(-1, 3, -1, -1)), Luma.mask().to(grey.device), Luma())

    @classmethod
    def patch_means(cls, means: Tensor, factor: int) -> Known:
        """Images of which the means of square patches are known.

        Args:
            means (`Tensor` of shape `(batch, channels, height, width)`): one for each patch.
            factor (`int`): pixels on a patch's side.
        """
        basis = Patches(factor)
        enlarged = means.repeat_interleave(factor, -2).repeat_interleave(factor, -1)
        return cls(basis.coefficients(enlarged), basis.mask().to(means.device), basis)

    def to(self, device: torch.device | str) -> Known:
        """The same on another device."""
        basis = self.basis.to(device) if hasattr(self.basis, "to") else self.basis
        return Known(self.coefficients.to(device), self.mask.to(device), basis)

    def put_back(self, images: Tensor) -> Tensor:
        """`images` with the known part in its place. Of the shape and precision of `images`."""
        # The change of basis in half precision would lose what is known.
        precision = torch.promote_types(self.coefficients.real.dtype, torch.float32)
        there = self.basis.coefficients(images.to(precision))
        return self.basis.images(torch.where(self.mask, self.coefficients, there)).to(images.dtype)

    def start(self) -> Tensor:
        """The known part alone, zero elsewhere: what the first noise is added to."""
        return self.basis.images(self.coefficients.where(self.mask, torch.zeros_like(self.coefficients)))

    def into_range(self, images: Tensor, low: float, high: float) -> Tensor:
        """`images`, whose known part is in its place, as they can be shown: with values in [`low`, `high`]."""
        if hasattr(self.basis, "into_range"):
            images = self.basis.into_range(images, low, high)
        return images.clamp(low, high)


# Formulas -----------------------------------------------------------------------------------------------------------


def luma(images: Tensor) -> Tensor:
    """The luma of images of shape `(batch, 3, height, width)`, in their range of values."""
    red, green, blue = (weight / sum(LUMA_WEIGHTS) for weight in LUMA_WEIGHTS)
    return red * images[:, :1] + green * images[:, 1:2] + blue * images[:, 2:]


def reflect(values: Tensor, axis: tuple[float, ...], dim: int) -> Tensor:
    """The reflection of a dimension that exchanges its first axis with another (Householder 1958).

    Args:
        values (`Tensor`): of any shape.
        axis (`tuple` of `values.shape[dim]` numbers): the other axis, of any length, not along the first.
        dim (`int`): counted from the front.
    """
    normal = _normal(axis, values.device, values.dtype).view(-1, *[1] * (values.ndim - 1 - dim))
    return values - 2 * normal * (normal * values).sum(dim, keepdim=True)


@functools.lru_cache(maxsize=64)
def _normal(axis: tuple[float, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Of the mirror between the first axis and another; kept, as copying it to a device makes the host wait."""
    normal = torch.tensor(axis, dtype=torch.float64)
    normal /= normal.norm()
    normal[0] -= 1
    return (normal / normal.norm()).to(dtype).to(device)


def shrink(values: Tensor, centre: Tensor, low: float, high: float, dim: int) -> Tensor:
    """`values` drawn towards a centre that lies in [`low`, `high`], all of a dimension alike, until they do, too."""
    offset = values - centre
    room = torch.where(offset > 0, high - centre, centre - low)
    share = torch.where(offset.abs() > room, room / offset.abs(), 1.0).amin(dim, keepdim=True)
    return centre + share.clamp(min=0) * offset
