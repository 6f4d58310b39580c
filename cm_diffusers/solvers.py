"""The probability-flow ODE in sigma space, `dx/dsigma = (x - D(x; sigma)) / sigma`, and its solvers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from cm_diffusers.networks import send

Denoise = Callable[..., Tensor]
Solver = Callable[..., Tensor]


def expand(sigma: Tensor | float, sample: Tensor) -> Tensor:
    """`sigma` of shape `(batch,)` or `()`, ready to multiply `sample`."""
    sigma = sigma.to(sample.dtype) if isinstance(sigma, Tensor) else torch.tensor(sigma, dtype=sample.dtype)
    sigma = send(sigma, sample.device)
    return sigma.view(-1, *[1] * (sample.ndim - 1))


def derivative(sample: Tensor, denoised: Tensor, sigma: Tensor | float) -> Tensor:
    """`dx/dsigma` (Karras et al. 2022, equation 4)."""
    return (sample - denoised) / expand(sigma, sample)


def euler_step(
    denoise: Denoise, sample: Tensor, sigma: Tensor | float, sigma_next: Tensor | float, **conditioning: Any
) -> Tensor:
    """One first-order step from `sigma` to `sigma_next`, which is DDIM in these coordinates. One evaluation.

    Args:
        denoise (`Callable`): D, called as `denoise(sample, sigma, **conditioning)`.
        sample (`Tensor` of shape `(batch, ...)`): the state at `sigma`.
        sigma, sigma_next (`float` or `Tensor` of shape `(batch,)`): noise levels.
    """
    slope = derivative(sample, denoise(sample, sigma, **conditioning), sigma)
    return sample + (expand(sigma_next, sample) - expand(sigma, sample)) * slope


def heun_step(
    denoise: Denoise, sample: Tensor, sigma: Tensor | float, sigma_next: Tensor | float, **conditioning: Any
) -> Tensor:
    """One second-order step (Karras et al. 2022, algorithm 1), `sigma_next > 0`. Two evaluations."""
    gap = expand(sigma_next, sample) - expand(sigma, sample)
    slope = derivative(sample, denoise(sample, sigma, **conditioning), sigma)
    euler = sample + gap * slope
    slope_next = derivative(euler, denoise(euler, sigma_next, **conditioning), sigma_next)
    return sample + gap * (slope + slope_next) / 2


SOLVERS: dict[str, Solver] = {"euler": euler_step, "heun": heun_step}


def integrate(
    denoise: Denoise, sample: Tensor, sigmas: Sequence[float] | Tensor, solver: Solver = heun_step, **conditioning: Any
) -> Tensor:
    """Follow the ODE down `sigmas` and end with a jump to D at the last: how a teacher is sampled.

    Evaluations: `len(sigmas)` for Euler, `2 * len(sigmas) - 1` for Heun.

    Args:
        denoise (`Callable`): D.
        sample (`Tensor` of shape `(batch, ...)`): the state at `sigmas[0]`.
        sigmas (`Sequence[float]`): noise levels, descending.
    """
    return denoise(follow(denoise, sample, sigmas, solver, **conditioning), sigmas[-1], **conditioning)


def follow(
    denoise: Denoise, sample: Tensor, sigmas: Sequence[float] | Tensor, solver: Solver = heun_step, **conditioning: Any
) -> Tensor:
    """Follow the ODE along `sigmas`, down to images or up to noise.

    Args:
        denoise (`Callable`): D.
        sample (`Tensor` of shape `(batch, ...)`): the state at `sigmas[0]`.
        sigmas (`Sequence[float]`): noise levels, ascending or descending.
    """
    for sigma, sigma_next in zip(sigmas[:-1], sigmas[1:], strict=True):
        sample = solver(denoise, sample, sigma, sigma_next, **conditioning)
    return sample
