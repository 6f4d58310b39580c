"""What a training step minimises. An objective owns its networks and maps a batch of images to a loss."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor


class Objective(Protocol):
    """A training objective.

    `loss` takes clean images of shape `(batch, channels, height, width)` in the model's range, the step within the
    phase of training, and the conditioning of the network; it returns a scalar in float32.
    """

    def loss(self, images: Tensor, step: int, **conditioning: Any) -> Tensor: ...
