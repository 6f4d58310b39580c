"""Conversion of a student to a bounded prediction, before it is distilled.

At sigma = 80, `D = x - sigma * F` multiplies every error of an epsilon network by 80: a student that keeps predicting
epsilon learns one-step generation very slowly.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cm_diffusers.preconditioning import Denoiser, second_time
from cm_diffusers.solvers import Denoise, expand
from cm_diffusers.training.objectives import Losses
from cm_diffusers.training.randomness import SampleRandom


@dataclass(frozen=True)
class ConversionObjective:
    """Regression of the student's D on the teacher's, in the units of the student's own output.

    The weight `1 / c_out^2` makes it a plain regression of F. Noise levels have the density of the Karras grid, with
    extra mass at `sigma_max`, from where one-step samples start.

    Args:
        student ([`~cm_diffusers.preconditioning.Denoiser`]): D of the student, with gradient.
        teacher (`Callable`): D of the teacher.
        sigma_min, sigma_max, rho (`float`): the Karras schedule.
        extra (`float`): the part of the batch at `sigma_max`.
        flow_map (`bool`): the student is told the level that it is at as the one that it jumps to: it is D there.
    """

    student: Denoiser
    teacher: Denoise
    sigma_min: float
    sigma_max: float
    rho: float = 7.0
    extra: float = 0.1
    flow_map: bool = False

    def losses(self, images: Tensor, step: int, random: SampleRandom, **conditioning: Any) -> Losses:
        position = random.uniform().mul(1 + self.extra).clamp(max=1)
        low, high = self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)
        sigma = ((low + position * (high - low)) ** self.rho).float()
        sample = images + expand(sigma, images) * random.normal_like(images)
        with torch.no_grad():
            denoised = self.teacher(sample, sigma, **conditioning)
        family = self.student.preconditioning
        scale = expand(family.scalings(sigma).c_out, images)
        told = second_time(family, sigma, images.device) if self.flow_map else {}
        prediction = self.student(sample, sigma, **conditioning, **told)
        error = (prediction - denoised) / scale
        return Losses(error.square().flatten(1).mean(1), sigma, prediction)
