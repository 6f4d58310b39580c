"""How a diffusers UNet is called: with an image, a time, and what it is told beside them."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from diffusers.models.embeddings import GaussianFourierProjection
from torch import Tensor, nn

# How wide the guidance scale is told to networks that are told it (Luo et al. 2023).
GUIDANCE_CHANNELS = 256


def network_output(network: Callable[..., Any], sample: Tensor, c_noise: Tensor, **conditioning: Any) -> Tensor:
    """F: the network's prediction without the variance that some networks (`learned_range`) predict beside it.

    Args:
        network (`Callable`): called like a diffusers UNet.
        sample (`Tensor` of shape `(batch, channels, height, width)`): its input, scaled.
        c_noise (`Tensor` of shape `(batch,)` or `()`): its time.
        conditioning: the network's own arguments, such as `class_labels` or `encoder_hidden_states`; and
            `guidance_scale`, of shape `(batch,)`, of which a student is told by diffusers' `timestep_cond`.

    Raises:
        `ValueError`: if the network has another number of channels.
    """
    output = network(sample, c_noise, return_dict=False, **_as_taken(conditioning, sample.dtype))[0]
    channels = sample.shape[1]
    if output.shape[1] not in (channels, 2 * channels):
        raise ValueError(
            f"The network maps {channels} channels to {output.shape[1]}; expected {channels} or twice that."
        )
    prediction: Tensor = output[:, :channels]
    return prediction


def _as_taken(conditioning: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Embeddings in the network's precision; what goes through sines first is left in its own."""
    taken = dict(conditioning)
    if (scale := taken.pop("guidance_scale", None)) is not None:
        taken["timestep_cond"] = guidance_embedding(scale - 1).to(dtype)
    if (hidden := taken.get("encoder_hidden_states")) is not None:
        taken["encoder_hidden_states"] = hidden.to(dtype)
    if (added := taken.get("added_cond_kwargs")) is not None:
        taken["added_cond_kwargs"] = {**added, "text_embeds": added["text_embeds"].to(dtype)}
    return taken


def guidance_embedding(weight: Tensor, channels: int = GUIDANCE_CHANNELS) -> Tensor:
    """`[sin(1000 w f), cos(1000 w f)]` with frequencies f from 1 to 1/10,000 (Luo et al. 2023, appendix).

    Args:
        weight (`Tensor` of shape `(batch,)`): `w = guidance_scale - 1`.
        channels (`int`): even.

    Returns:
        `Tensor` of shape `(batch, channels)`: in float32.
    """
    half = channels // 2
    frequencies = torch.exp(torch.arange(half, device=weight.device) * (-math.log(10_000.0) / (half - 1)))
    angles = 1000.0 * weight.float()[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def networks_of(pipeline: Any) -> dict[str, nn.Module]:
    """The parts of a diffusers pipeline that have weights, by name."""
    return {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}


def frequencies(network: nn.Module) -> list[nn.Parameter]:
    """The fixed frequencies by which a network knows its time, if they are among its weights."""
    return [module.weight for module in network.modules() if isinstance(module, GaussianFourierProjection)]


def copy_in(network: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy in another precision, without one in the network's own on the way. Its frequencies stay as they are."""
    fixed = {id(weight) for weight in frequencies(network)}  # which are multiplied by times, and go through sines
    memo: dict[int, Tensor] = {
        id(weight): nn.Parameter(weight.detach().to(dtype, copy=True), weight.requires_grad)
        for weight in network.parameters()
        if weight.is_floating_point() and id(weight) not in fixed
    }
    memo |= {id(b): b.to(dtype, copy=True) for b in network.buffers() if b.is_floating_point()}
    return copy.deepcopy(network, memo)


def sharing_weights(network: nn.Module) -> nn.Module:
    """A copy with the same weights in memory, that can be frozen, moved, laid out and compiled on its own."""
    plain = [weight for weight in network.parameters() if type(weight) is nn.Parameter]  # and not quantised
    memo: dict[int, Tensor] = {id(weight): nn.Parameter(weight.detach(), False) for weight in plain}
    memo |= {id(buffer): buffer.detach() for buffer in network.buffers()}
    return copy.deepcopy(network, memo)


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor` on `device`, without waiting for what the device is busy with."""
    if tensor.device.type == "cpu" and device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
