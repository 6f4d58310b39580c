"""A weight of the loss that is learned while the student is."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cm_diffusers.networks import send
from cm_diffusers.training.objectives import Losses, Objective
from cm_diffusers.training.randomness import SampleRandom


class LogLoss(nn.Module):
    """u(sigma), an estimate of ln E[loss | sigma]: a cosine series in ln sigma over the range of noise levels.

    Args:
        sigma_min, sigma_max (`float`): the range.
        terms (`int`): of the series.
    """

    def __init__(self, sigma_min: float, sigma_max: float, terms: int = 16) -> None:
        super().__init__()
        self.low, self.high = math.log(sigma_min), math.log(sigma_max)
        self.coefficients = nn.Parameter(torch.zeros(terms))

    def forward(self, sigma: Tensor) -> Tensor:
        """
        Args:
            sigma (`Tensor` of shape `(batch,)`): noise levels, on the device of the module.

        Returns:
            `Tensor` of shape `(batch,)`.
        """
        position = (sigma.log() - self.low) / (self.high - self.low)
        order = torch.arange(len(self.coefficients), device=sigma.device)
        # No matrix product, which autocast would round.
        return (torch.cos(math.pi * position[:, None] * order) * self.coefficients).sum(1)


@dataclass(frozen=True)
class AdaptivelyWeighted:
    """`loss / e^u + u`, least where u is ln E[loss | sigma]: every noise level then counts the same.

    Karras et al. 2024, equation 21; Lu & Song 2024, section 4.2.

    Args:
        objective ([`~cm_diffusers.training.objectives.Objective`]): whose losses are weighted.
        log_loss ([`LogLoss`]): u, trained with the student.
    """

    objective: Objective
    log_loss: nn.Module

    def losses(self, images: Tensor, step: int, random: SampleRandom, **conditioning: Any) -> Losses:
        found = self.objective.losses(images, step, random, **conditioning)
        estimate = self.log_loss(send(found.sigma, images.device))
        weighted = found.values * torch.exp(-estimate) + estimate
        return found._replace(values=weighted, terms={**found.terms, "unweighted": found.values})
