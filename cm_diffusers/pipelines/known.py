"""What is known of an image that a consistency model completes (Song et al. 2023, algorithm 4)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Known:
    """The known part of images: their values where `mask` is set.

    Args:
        values (`Tensor` of shape `(batch, channels, height, width)`): images, in the model's range of values.
        mask (`Tensor` of booleans, broadcast to the shape of `values`): where they are known.
    """

    values: Tensor
    mask: Tensor

    def put_back(self, images: Tensor) -> Tensor:
        """`images` with the known part in its place. Of the shape of `images`."""
        return torch.where(self.mask, self.values.to(images), images)

    def start(self) -> Tensor:
        """The known part alone, zero elsewhere: what the first noise is added to."""
        return self.put_back(torch.zeros_like(self.values))
