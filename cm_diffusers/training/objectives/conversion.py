"""Conversion of a student to a bounded prediction, before it is distilled.

At sigma = 80, `D = x - sigma * F` multiplies every error of an epsilon network by 80: a student that keeps predicting
epsilon learns one-step generation very slowly.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cm_diffusers.preconditioning import Denoiser
from cm_diffusers.training.solvers import Denoise, expand


@dataclass(frozen=True)
class ConversionObjective:
    """Regression of the student's D on the teacher's, in the units of the student's own output.

    The weight `1 / c_out^2` makes it a plain regression of F. Noise levels are uniform in ln sigma, with extra mass at
    `sigma_max`, from where one-step samples start.

    Args:
        student ([`~cm_diffusers.preconditioning.Denoiser`]): D of the student, with gradient.
        teacher (`Callable`): D of the teacher.
        sigma_min, sigma_max (`float`): the range.
        extra (`float`): the part of the batch at `sigma_max`.
    """

    student: Denoiser
    teacher: Denoise
    sigma_min: float
    sigma_max: float
    extra: float = 0.1

    def loss(self, images: Tensor, step: int, **conditioning: Any) -> Tensor:
        position = torch.rand(len(images)) * (1 + self.extra)
        sigma = (self.sigma_min * (self.sigma_max / self.sigma_min) ** position).clamp(max=self.sigma_max)
        sample = images + expand(sigma, images) * torch.randn_like(images)
        with torch.no_grad():
            denoised = self.teacher(sample, sigma, **conditioning)
        scale = expand(self.student.preconditioning.scalings(sigma).c_out, images)
        return ((self.student(sample, sigma, **conditioning) - denoised) / scale).square().mean()
