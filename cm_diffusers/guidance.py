"""Classifier-free guidance on a denoiser (Ho & Salimans 2022)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from cm_diffusers.networks import send
from cm_diffusers.preconditioning import Denoiser

# From what a network is told to what it is told where it shall know nothing.
WithoutCondition = Callable[[Mapping[str, Any]], dict[str, Any]]


def without_class(null_class_label: int) -> WithoutCondition:
    """The label that stands for 'no class', in place of every label."""

    def without(conditioning: Mapping[str, Any]) -> dict[str, Any]:
        labels = conditioning["class_labels"]
        return {**conditioning, "class_labels": torch.full_like(labels, null_class_label)}

    return without


class GuidedDenoiser:
    """`D_null + scale * (D - D_null)`, both halves in one pass.

    Args:
        denoiser ([`~cm_diffusers.preconditioning.Denoiser`]): a conditional denoiser.
        scale (`float`): guidance scale; 1 is no guidance. A `guidance_scale` of shape `(batch,)` among what the
            denoiser is told takes its place.
        without (`Callable`): the conditioning of D_null, from that of D.
    """

    def __init__(self, denoiser: Denoiser, scale: float, without: WithoutCondition) -> None:
        self.denoiser, self.scale, self.without = denoiser, scale, without

    def __call__(
        self, sample: Tensor, sigma: Tensor | float, *, guidance_scale: Tensor | None = None, **conditioning: Any
    ) -> Tensor:
        sigma = torch.as_tensor(sigma).expand(len(sample))
        both = _concatenated(conditioning, self.without(conditioning))
        denoised = self.denoiser(torch.cat([sample] * 2), torch.cat([sigma] * 2), **both)
        conditional, unconditional = denoised.chunk(2)
        if guidance_scale is None:
            return torch.lerp(unconditional, conditional, self.scale)
        scale = send(guidance_scale.to(denoised.dtype), denoised.device).view(-1, *[1] * (sample.ndim - 1))
        return torch.lerp(unconditional, conditional, scale)


def _concatenated(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """Two batches of conditioning as one."""
    return {
        name: _concatenated(value, second[name]) if isinstance(value, Mapping) else torch.cat([value, second[name]])
        for name, value in first.items()
    }
