"""An adversarial term: the student's images must not be told from real ones.

A distilled student cannot be better than its teacher unless it sees real images, too (Kim et al. 2024, Yin et al.
2024). Real and generated images are given noise and shown to the frozen teacher, whose features at its lowest
resolution a small head learns to tell apart (Sauer et al. 2024).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cm_diffusers.networks import send
from cm_diffusers.noise_levels import lognormal_sigmas
from cm_diffusers.preconditioning import Preconditioning
from cm_diffusers.solvers import expand
from cm_diffusers.training.objectives import Losses, Objective
from cm_diffusers.training.randomness import SampleRandom
from cm_diffusers.training.teacher import Teacher

# ln sigma of the noise under which images are compared: features of all sizes, and not only of single pixels.
P_MEAN, P_STD = -0.4, 1.2


class Discriminator(nn.Module):
    """The head: logits from features, above 0 for real images.

    Args:
        channels (`int`): of the features.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(channels, 64, 1), nn.SiLU(), nn.Conv2d(64, 64, 1), nn.SiLU())
        self.logit = nn.Linear(64, 1)

    def forward(self, features: Tensor) -> Tensor:
        """From features of shape `(batch, channels, height, width)` to logits of shape `(batch,)`."""
        logits: Tensor = self.logit(self.layers(features).mean((2, 3)))
        return logits.squeeze(1)


def feature_channels(teacher: Teacher) -> int:
    """How many channels [`features`] has.

    Raises:
        `ValueError`: if the network has no middle block to take them from.
    """
    config: Any = teacher.unet.config
    if getattr(teacher.unet, "mid_block", None) is None:
        raise ValueError(
            f"`adversarial_weight` needs a teacher with a `mid_block`, not a {type(teacher.unet).__name__}."
        )
    return int(config.block_out_channels[-1])


def features(
    network: Any, preconditioning: Preconditioning, sample: Tensor, sigma: Tensor, **conditioning: Any
) -> Tensor:
    """What the middle block of a network gives at a noise level, in float32.

    Args:
        network (`nn.Module`): a diffusers UNet.
        preconditioning ([`~cm_diffusers.preconditioning.Preconditioning`]): its family.
        sample (`Tensor` of shape `(batch, channels, height, width)`): `x0 + sigma * n`.
        sigma (`Tensor` of shape `(batch,)`): noise levels.
    """
    found: list[Tensor] = []
    hook = network.mid_block.register_forward_hook(lambda block, inputs, output: found.append(output))
    scalings = preconditioning.scalings(sigma)
    scaled = (sample / expand(scalings.input_scale, sample)).to(network.dtype)
    try:
        # Not through a compiled graph, which hooks would break.
        network.forward(scaled, send(scalings.c_noise, sample.device), return_dict=False, **conditioning)
    finally:
        hook.remove()
    return found[0].float()


@dataclass(frozen=True)
class Adversarial:
    """Another objective's losses, plus `weight * softplus(-logit)` of the student's images, and the head's own loss.

    One backward pass trains both: the student's term sees the head as a constant, the head's sees images as constants.

    Args:
        objective ([`~cm_diffusers.training.objectives.Objective`]): the method's.
        discriminator ([`Discriminator`]): the head.
        teacher ([`~cm_diffusers.training.teacher.Teacher`]): whose features it sees.
        weight (`float`): of the student's term.
        sigma_min, sigma_max (`float`): the range of noise.
    """

    objective: Objective
    discriminator: nn.Module
    teacher: Teacher
    weight: float
    sigma_min: float
    sigma_max: float

    def losses(self, images: Tensor, step: int, random: SampleRandom, **conditioning: Any) -> Losses:
        found = self.objective.losses(images, step, random, **conditioning)
        sigma = lognormal_sigmas(random.uniform(), P_MEAN, P_STD, self.sigma_min, self.sigma_max)
        noise = expand(sigma, images) * random.normal_like(images)

        def seen(clean: Tensor) -> Tensor:
            family = self.teacher.preconditioning
            return features(self.teacher.unet, family, clean + noise, sigma, **conditioning)

        with torch.no_grad():
            real = seen(images)
        generated = seen(found.denoised)
        frozen = {name: weight.detach() for name, weight in self.discriminator.named_parameters()}
        fooled: Tensor = torch.func.functional_call(self.discriminator, frozen, (generated,))
        fooling = F.softplus(-fooled)
        telling = F.softplus(-self.discriminator(real)) + F.softplus(self.discriminator(generated.detach()))
        terms = {**found.terms, "method": found.values, "adversarial": fooling, "discriminator": telling}
        return found._replace(values=found.values + self.weight * fooling + telling, terms=terms)
