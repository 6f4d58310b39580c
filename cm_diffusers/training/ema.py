"""Exponential moving averages of a network's weights."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from cm_diffusers.training.lora import sharing_frozen, trained
from cm_diffusers.training.sharding import own_part, whole_tensor


class EMA:
    """A frozen copy of a network that follows it.

    Args:
        network (`nn.Module`): the network to follow; the copy starts from its weights, in float32.
    """

    def __init__(self, network: nn.Module) -> None:
        # What is frozen in the network stays common to both.
        self.network = sharing_frozen(network).eval()
        for weight in trained(self.network):
            weight.data = weight.data.float()
            weight.requires_grad_(False)
        self._followed: nn.Module | None = None
        self._weights: list[tuple[Tensor, Tensor]] = []
        self._buffers: list[tuple[Tensor, Tensor]] = []

    @torch.no_grad()
    def update(self, network: nn.Module, decay: float) -> None:
        """`ema <- decay * ema + (1 - decay) * network`, each part where it is. Buffers are copied."""
        if network is not self._followed:
            self._pair_with(network)
        own, other = ([own_part(pair[place]).detach() for pair in self._weights] for place in (0, 1))
        torch._foreach_lerp_(own, [weight.float() for weight in other], 1 - decay)
        for buffer, source in self._buffers:
            buffer.copy_(source)

    def _pair_with(self, network: nn.Module) -> None:
        """Find what follows what, once: to walk through all modules takes as long as to average small ones."""
        pairs = zip(self.network.parameters(), network.parameters(), strict=True)
        self._weights = [pair for pair in pairs if pair[0] is not pair[1]]
        self._buffers = list(zip(self.network.buffers(), network.buffers(), strict=True))
        self._followed = network

    def restart(self, network: nn.Module) -> None:
        """Forget the past."""
        self.update(network, decay=0.0)


def whole(network: nn.Module) -> nn.Module:
    """A network that is not sharded: itself, or a copy from the parts of all processes. Called by all of them."""
    if not any(own_part(weight) is not weight for weight in network.parameters()):
        return network
    plain: Any = next(kind for kind in type(network).__mro__ if not issubclass(kind, FSDPModule))
    with torch.device("meta"):
        copied: nn.Module = plain.from_config(network.config)
    weights = dict(network.named_parameters())
    tensors = {name: whole_tensor(weights.get(name, value)) for name, value in network.state_dict().items()}
    copied.load_state_dict(tensors, assign=True)
    return copied.eval()


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
