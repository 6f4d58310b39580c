"""Noise levels: the Karras grid, curricula of training, and which pair of levels a sample draws."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor


class LevelPair(NamedTuple):
    """Two neighbouring noise levels per sample, `sigma > sigma_lower`: shape `(batch,)`, float32, on the CPU."""

    sigma: Tensor
    sigma_lower: Tensor


class Levels(Protocol):
    """The noise levels of a run."""

    def at(self, step: int, position: Tensor) -> LevelPair:
        """The pairs of one batch at training step `step`, for `position` uniform on [0, 1) and of shape `(batch,)`."""

    def describe(self, step: int) -> dict[str, float]:
        """Where the curriculum stands, for the log."""


def karras_sigmas(ramp: np.ndarray, sigma_min: float, sigma_max: float, rho: float = 7.0) -> np.ndarray:
    """Noise levels along the Karras schedule (Karras et al. 2022, equation 5).

    Args:
        ramp (`np.ndarray`): positions from 0 (`sigma_max`) to 1 (`sigma_min`).
        sigma_min, sigma_max (`float`): the ends.
        rho (`float`): curvature; larger spends more levels on small sigma.

    Returns:
        `np.ndarray`: in float64, with the ends up to rounding.
    """
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    sigmas: np.ndarray = (high + ramp * (low - high)) ** rho
    return sigmas


def karras_grid(num_levels: int, sigma_min: float, sigma_max: float, rho: float = 7.0) -> Tensor:
    """The ascending Karras grid with exact ends, in float32.

    Args:
        num_levels (`int`): N >= 2.

    Raises:
        `ValueError`: if `num_levels < 2` or the ends are not `0 < sigma_min < sigma_max`.
    """
    if num_levels < 2:
        raise ValueError(f"A grid needs at least 2 noise levels, got `num_levels={num_levels}`.")
    if not 0 < sigma_min < sigma_max:
        raise ValueError(f"Need 0 < sigma_min < sigma_max, got sigma_min={sigma_min}, sigma_max={sigma_max}.")
    sigmas = karras_sigmas(np.linspace(1, 0, num_levels), sigma_min, sigma_max, rho)
    sigmas[0], sigmas[-1] = sigma_min, sigma_max
    return torch.from_numpy(sigmas).float()


# Curricula: pure functions of the step, so that every rank computes the same ----------------------------------------


def progressive_num_levels(step: int, total_steps: int, s0: int, s1: int) -> int:
    """N(k) of Song et al. 2023, appendix C: from `s0` to `s1 + 1` levels, growing like a square root."""
    progress = min(step / total_steps, 1.0)
    return math.ceil(math.sqrt(progress * ((s1 + 1) ** 2 - s0**2) + s0**2) - 1) + 1


def doubling_num_levels(step: int, total_steps: int, s0: int, s1: int) -> int:
    """N(k) of Song & Dhariwal 2023, equation 7: `s0 + 1` levels, doubling at equal intervals until `s1 + 1`.

    Without the floor in theirs of `s1 / s0`, which would leave out the last stage where that is no whole number.
    """
    stages = math.log2(s1 / s0)
    interval = max(math.floor(total_steps / (stages + 1)), 1)
    doublings = min(step // interval, math.ceil(stages))
    return min(s0 << doublings, s1) + 1


def stage_at(step: int, total_steps: int, stages: int) -> int:
    """0, 1, ... `stages - 1` at equal intervals of a run (Geng et al. 2024, section 3.3)."""
    return min(step * stages // total_steps, stages - 1)


def progressive_mu(num_levels: int, s0: int, mu0: float) -> float:
    """mu(k) = exp(s0 * ln mu0 / N(k)): the target's decay that goes with N(k) (Song et al. 2023, appendix C)."""
    return math.pow(mu0, s0 / num_levels)


# Which pair of neighbouring levels a sample draws -------------------------------------------------------------------


def lognormal_probabilities(sigmas: Tensor, p_mean: float, p_std: float) -> Tensor:
    """p(i) of the pair `(sigma_i, sigma_{i+1})` under a lognormal (Song & Dhariwal 2023, equation 9)."""
    cumulative = torch.special.erf((sigmas.double().log() - p_mean) / (math.sqrt(2) * p_std))
    probabilities: Tensor = cumulative.diff()
    return probabilities / probabilities.sum()


def pairs_at(sigmas: Tensor, position: Tensor, probabilities: Tensor | None = None) -> LevelPair:
    """Neighbouring levels of an ascending grid, by inversion of their cumulative distribution.

    Args:
        sigmas (`Tensor` of shape `(num_levels,)`): the grid.
        position (`Tensor` of shape `(batch,)`): uniform on [0, 1).
        probabilities (`Tensor` of shape `(num_levels - 1,)`, *optional*): of each pair; uniform when `None`.
    """
    pairs = len(sigmas) - 1
    if probabilities is None:
        index = (position * pairs).long()
    else:
        index = torch.searchsorted(probabilities.cumsum(0), position.to(probabilities.dtype), right=True)
    index = index.clamp(max=pairs - 1)
    return LevelPair(sigmas[index + 1], sigmas[index])


def lognormal_sigmas(position: Tensor, p_mean: float, p_std: float, low: float, high: float) -> Tensor:
    """ln sigma ~ N(p_mean, p_std^2) between `low` and `high`, by inversion of its cumulative distribution.

    Args:
        position (`Tensor` of shape `(batch,)`): uniform on [0, 1), in float64.
        p_mean, p_std (`float`): of ln sigma, before it is cut off at the ends.
        low, high (`float`): the ends.

    Returns:
        `Tensor` of shape `(batch,)`: in float32.
    """
    ends = torch.special.ndtr((torch.tensor([low, high], dtype=torch.float64).log() - p_mean) / p_std)
    normal = torch.special.ndtri(torch.lerp(ends[0], ends[1], position.double()))
    sigmas: Tensor = (p_mean + p_std * normal).exp().float()
    return sigmas.clamp(low, high)


def mapped_lower(sigma: Tensor, stage: int, base: float, sigma_min: float) -> Tensor:
    """r(sigma) of easy consistency tuning, `sigma * (1 - n(sigma) / base^(stage + 1))` (Geng et al. 2024).

    `n = 1 + 8 * sigmoid(-sigma)` makes the gap of small levels wider. Where r would fall below `sigma_min` it is that:
    the consistency function is the identity there, and the target the clean image itself.
    """
    gap = (1 + 8 * torch.sigmoid(-sigma)) / base ** (stage + 1)
    return (sigma * (1 - gap)).clamp(min=sigma_min)


@dataclass(frozen=True)
class GridLevels:
    """Neighbours on a grid whose size is a function of the step.

    Args:
        num_levels (`Callable[[int], int]`): N(k).
        sigma_min, sigma_max, rho (`float`): the Karras grid.
        lognormal (`tuple[float, float]`, *optional*): mean and standard deviation of ln sigma when pairs are drawn
            by a discretised lognormal; uniformly when `None`.
    """

    num_levels: Callable[[int], int]
    sigma_min: float
    sigma_max: float
    rho: float = 7.0
    lognormal: tuple[float, float] | None = None

    def at(self, step: int, position: Tensor) -> LevelPair:
        grid, probabilities = self._grid(self.num_levels(step))
        return pairs_at(grid, position, probabilities)

    def describe(self, step: int) -> dict[str, float]:
        return {"num_levels": self.num_levels(step)}

    @functools.lru_cache(maxsize=1)  # noqa: B019  one run, one grid at a time
    def _grid(self, num_levels: int) -> tuple[Tensor, Tensor | None]:
        grid = karras_grid(num_levels, self.sigma_min, self.sigma_max, self.rho)
        return grid, None if self.lognormal is None else lognormal_probabilities(grid, *self.lognormal)


@dataclass(frozen=True)
class DiscreteLevels:
    """Neighbours among the noise levels of some timesteps of a discrete schedule (Luo et al. 2023), drawn uniformly.

    Args:
        sigmas (`Tensor` of shape `(num_levels,)`): ascending.
    """

    sigmas: Tensor

    def at(self, step: int, position: Tensor) -> LevelPair:
        return pairs_at(self.sigmas, position)

    def describe(self, step: int) -> dict[str, float]:
        return {"num_levels": len(self.sigmas)}


@dataclass(frozen=True)
class MappedLevels:
    """Any level, with one below it that comes nearer from stage to stage (Geng et al. 2024).

    Args:
        stage (`Callable[[int], int]`): of a step.
        base (`float`): the gap shrinks by this factor with every stage.
        sigma_min, sigma_max (`float`): the ends.
        p_mean, p_std (`float`): of ln sigma, which is normal between the ends.
        sigma_boundary (`float`, *optional*): for a student that knows only the levels from here up (Lee et al. 2024):
            it is the lowest of the higher levels, and `boundary_share` of the batch are there. They count as much as
            the others: with a tenth of it, as published, students of known problems drifted off.
        boundary_share (`float`): see above.
    """

    stage: Callable[[int], int]
    base: float
    sigma_min: float
    sigma_max: float
    p_mean: float
    p_std: float
    sigma_boundary: float | None = None
    boundary_share: float = 0.25

    def at(self, step: int, position: Tensor) -> LevelPair:
        if self.sigma_boundary is None:
            # Nearer to sigma_min, what f changes would drown in rounding.
            sigma = self._above(1.01 * self.sigma_min, position)
        else:
            rest = (position - self.boundary_share).clamp(min=0) / (1 - self.boundary_share)
            sigma = self._above(self.sigma_boundary, rest)
            sigma = sigma.masked_fill(position < self.boundary_share, self.sigma_boundary)
        return LevelPair(sigma, mapped_lower(sigma, self.stage(step), self.base, self.sigma_min))

    def _above(self, low: float, position: Tensor) -> Tensor:
        return lognormal_sigmas(position, self.p_mean, self.p_std, low, self.sigma_max)

    def describe(self, step: int) -> dict[str, float]:
        return {"stage": self.stage(step)}


def default_second_sigma(image_size: int) -> float:
    """The level that two-step sampling returns to when nobody has searched for a better one.

    A power law through the values published for images of 32, 64 and 256 pixels: 0.6 to 0.8 (CIFAR-10), 1.4 to 1.9
    (ImageNet-64) and 4.0 to 4.4 (LSUN bedroom); Song et al. 2023, Geng et al. 2024. It ends there: of the levels from
    0.2 to 1.2, students of digits (8 pixels) and of Fashion-MNIST (16) have their least FID at 0.55 to 0.9, too.
    """
    return 0.7 * math.pow(max(image_size, 32) / 32, 0.86)
