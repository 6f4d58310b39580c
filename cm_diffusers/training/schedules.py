"""Schedules of a run as pure functions of the step: the same on every rank, and nothing to save."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

from cm_diffusers.noise_levels import Levels, doubling_num_levels, progressive_mu, progressive_num_levels
from cm_diffusers.training.config import ConsistencyConfig


def learning_rate(step: int, total_steps: int, peak: float, schedule: str, warmup_steps: int = 0) -> float:
    """The learning rate of step 0, 1, ...: a linear warm-up, then constant, or a linear or cosine way down to 0.

    Args:
        step (`int`): steps taken so far.
        total_steps (`int`): steps in all.
        peak (`float`): the highest rate.
        schedule (`str`): `"constant"`, `"linear"` or `"cosine"`.
        warmup_steps (`int`): steps until the peak.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = min((step - warmup_steps) / max(total_steps - warmup_steps, 1), 1.0)
    if schedule == "linear":
        return peak * (1 - progress)
    if schedule == "cosine":
        return peak * (1 + math.cos(math.pi * progress)) / 2
    return peak


def num_levels_schedule(config: ConsistencyConfig) -> Callable[[int], int]:
    """N(k) of a resolved config."""
    if config.levels == "fixed":
        return functools.partial(_constant, value=config.num_levels or 2)
    curriculum = progressive_num_levels if config.levels == "progressive" else doubling_num_levels
    return functools.partial(curriculum, total_steps=config.max_train_steps, s0=config.s0 or 1, s1=config.s1 or 1)


def _constant(step: int, value: int) -> int:
    return value


def mu_schedule(config: ConsistencyConfig, levels: Levels) -> Callable[[int], float]:
    """mu(k), the decay of the target, of a resolved config."""
    mu = config.mu or 0.0
    if config.mu_schedule != "progressive":
        return lambda step: mu
    return lambda step: progressive_mu(levels.num_levels(step), config.s0 or 1, mu)


def make_levels(config: ConsistencyConfig, sigma_min: float, sigma_max: float, rho: float) -> Levels:
    """The noise levels of a resolved config."""
    lognormal = (config.p_mean, config.p_std) if config.level_distribution == "lognormal" else None
    return Levels(num_levels_schedule(config), sigma_min, sigma_max, rho, lognormal)
