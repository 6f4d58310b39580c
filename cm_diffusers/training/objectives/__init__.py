"""What a training step minimises. An objective owns its networks and maps a batch of images to losses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from cm_diffusers.training.randomness import SampleRandom


class Losses(NamedTuple):
    """The weighted loss of every sample, the noise level it was taken at, and what was predicted there.

    `values`, with its graph, has the shape `(batch,)` in float32 on the device of the images; `sigma` the same shape,
    on the CPU; `denoised`, with its graph, is the student's clean image, of the shape of the images. `terms` are what
    else is worth a look, by name and of the shape of `values`: they are logged.
    """

    values: Tensor
    sigma: Tensor
    denoised: Tensor
    terms: Mapping[str, Tensor] = {}


class Objective(Protocol):
    """A training objective.

    `losses` takes clean images of shape `(batch, channels, height, width)` in the model's range, the step within the
    phase of training, the random numbers of the batch, and the conditioning of the network.
    """

    def losses(self, images: Tensor, step: int, random: SampleRandom, **conditioning: Any) -> Losses: ...
