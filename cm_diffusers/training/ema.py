"""Exponential moving averages of a network's weights."""

from __future__ import annotations

import copy
import math

import torch
from torch import nn


class EMA:
    """A frozen copy of a network that follows it.

    Args:
        network (`nn.Module`): the network to follow; the copy starts from its weights, in float32.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = copy.deepcopy(network).float().requires_grad_(False).eval()

    @torch.no_grad()
    def update(self, network: nn.Module, decay: float) -> None:
        """`ema <- decay * ema + (1 - decay) * network`, all weights at once. Buffers are copied."""
        own: list[torch.Tensor] = list(self.network.parameters())
        torch._foreach_lerp_(own, [p.detach().float() for p in network.parameters()], 1 - decay)
        for buffer, source in zip(self.network.buffers(), network.buffers(), strict=True):
            buffer.copy_(source)

    def restart(self, network: nn.Module) -> None:
        """Forget the past."""
        self.update(network, decay=0.0)


def decay_for_half_life(half_life: float, batch_size: int, images_seen: int, rampup: float | None) -> float:
    """The decay per step that halves a weight's share within `half_life` images, whatever the batch size.

    Args:
        half_life (`float`): in images.
        batch_size (`int`): images per step, over all devices.
        images_seen (`int`): since the start.
        rampup (`float`, *optional*): limits the half-life to this part of `images_seen`, so that short runs do not
            average over their beginning (Karras et al. 2022, training code).
    """
    if rampup is not None:
        half_life = min(half_life, images_seen * rampup)
    return math.pow(0.5, batch_size / max(half_life, 1e-8))
