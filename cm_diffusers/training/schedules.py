"""Schedules of a run as pure functions of the step: the same on every rank, and nothing to save."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from cm_diffusers.noise_levels import (
    GridLevels,
    Levels,
    MappedLevels,
    doubling_num_levels,
    lognormal_sigmas,
    progressive_mu,
    progressive_num_levels,
    stage_at,
)
from cm_diffusers.training.config import ConsistencyConfig

PUBLISHED_STEPS = 800_000  # of consistency training on CIFAR-10, which the progressive mu is for


def default_learning_rate(channels: int) -> float:
    """A peak rate for Adam that moves networks of every width alike: 1e-4 at 256 channels, 1e-3 at most.

    Adam moves each weight by as much as the rate says, so what a layer gives changes with the rate times the number of
    its inputs (Yang et al. 2022). At 256 channels consistency models are trained with 1e-4 (Song & Dhariwal 2023, Geng
    et al. 2024), at 768 and 1024 with 1e-5 (Song et al. 2023).

    Args:
        channels (`int`): of the network where it is widest.
    """
    return min(1e-4 * 256 / channels, 1e-3)


@dataclass(frozen=True)
class Rate:
    """The learning rate of step 0, 1, ...: a linear warm-up, then constant, or a linear or cosine way down to 0.

    Args:
        peak (`float`): the highest rate.
        total_steps (`int`): steps in all.
        schedule (`str`): `"constant"`, `"linear"` or `"cosine"`.
        warmup_steps (`int`): steps until the peak.
        taken (`int`): steps of it that came before the one that is called 0.
    """

    peak: float
    total_steps: int
    schedule: str
    warmup_steps: int = 0
    taken: int = 0

    def __call__(self, step: int) -> float:
        step += self.taken
        if step < self.warmup_steps:
            return self.peak * (step + 1) / self.warmup_steps
        progress = min((step - self.warmup_steps) / max(self.total_steps - self.warmup_steps, 1), 1.0)
        if self.schedule == "linear":
            return self.peak * (1 - progress)
        if self.schedule == "cosine":
            return self.peak * (1 + math.cos(math.pi * progress)) / 2
        return self.peak

    def after(self, steps: int) -> Rate:
        """The same rate, for a stage that begins after so many steps."""
        return dataclasses.replace(self, taken=self.taken + steps)


def num_levels_schedule(config: ConsistencyConfig) -> Callable[[int], int]:
    """N(k) of a resolved config."""
    if config.levels == "fixed":
        return functools.partial(_constant, value=config.num_levels or 2)
    curriculum = progressive_num_levels if config.levels == "progressive" else doubling_num_levels
    return functools.partial(curriculum, total_steps=config.max_train_steps, s0=config.s0 or 1, s1=config.s1 or 1)


def _constant(step: int, value: int) -> int:
    return value


def mu_schedule(config: ConsistencyConfig) -> Callable[[int], float]:
    """mu(k), the decay of the target, of a resolved config.

    The progressive one is meant for 800,000 steps (Song et al. 2023, table 3), and at N = 151 averages over 700. In
    shorter runs it averages over the same share of them: the target would not get anywhere otherwise.
    """
    mu = config.mu or 0.0
    if config.mu_schedule != "progressive":
        return lambda step: mu
    num_levels = num_levels_schedule(config)
    faster = max(1.0, PUBLISHED_STEPS / config.max_train_steps)
    return lambda step: math.pow(progressive_mu(num_levels(step), config.s0 or 1, mu), faster)


def grid_length(config: ConsistencyConfig) -> int | None:
    """How many levels the grid of a resolved config has in the end; `None` where levels are on no grid."""
    if config.levels in ("mapping", "continuous", "skipping"):
        return None
    return num_levels_schedule(config)(config.max_train_steps - 1)


def make_levels(
    config: ConsistencyConfig, steps: int, sigma_min: float, sigma_max: float, rho: float, is_truncated: bool = False
) -> Levels:
    """The pairs of levels of a resolved config, for a phase of `steps` steps: the first, or the truncated second."""
    mean, std = config.p_mean or 0.0, config.p_std or 1.0
    if config.levels == "mapping":
        stages = config.stages or 1
        stage = functools.partial(stage_at, total_steps=steps, stages=stages)
        if is_truncated:  # as near to each other as the first stage's were at its end
            stage = functools.partial(_constant, value=stages - 1)
        boundary = config.truncation if is_truncated else None
        return MappedLevels(stage, config.mapping_base or 2.0, sigma_min, sigma_max, mean, std, boundary)
    lognormal = (mean, std) if config.level_distribution == "lognormal" else None
    return GridLevels(num_levels_schedule(config), sigma_min, sigma_max, rho, lognormal)


def make_sigmas(config: ConsistencyConfig, sigma_min: float, sigma_max: float) -> Callable[[Tensor], Tensor]:
    """The single levels of a resolved config, from positions that are uniform on [0, 1)."""
    return functools.partial(
        lognormal_sigmas, p_mean=config.p_mean or 0.0, p_std=config.p_std or 1.0, low=sigma_min, high=sigma_max
    )
