"""The schedulers of diffusers that compute what a student's does, for users who do not have this package."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from diffusers import LCMScheduler

from cm_diffusers.network_config import BETA_FIELDS
from cm_diffusers.preconditioning import Preconditioning
from cm_diffusers.schedulers.sampling_levels import SamplingLevels, original_timesteps

STOCK_CLASS = "CMStochasticIterativeScheduler"
STOCK_FIELDS = {"num_train_timesteps", "sigma_min", "sigma_max", "sigma_data", "s_noise", "rho", "clip_denoised"}
LCM_BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")


# CMStochasticIterativeScheduler --------------------------------------------------------------------------------------


def is_stock(config: Mapping[str, Any]) -> bool:
    """See [`ConsistencyScheduler.is_stock`]."""
    same_grid = config["num_levels"] in (None, config["num_train_timesteps"])
    return config["family"] == "consistency" and tuple(config["image_range"]) == (-1.0, 1.0) and same_grid


def stock_config(config: Mapping[str, Any], scheduler_class: type) -> dict[str, Any]:
    """The config of a scheduler that is stock, as it is saved.

    What diffusers' class has no argument for, it warns of: what says nothing is left out.
    """
    own = {name: value.default for name, value in inspect.signature(scheduler_class).parameters.items()}
    plain = {name: list(value) if isinstance(value, tuple) else value for name, value in own.items()}
    silent = {name for name in own.keys() - STOCK_FIELDS if config[name] == plain[name]}
    return {**{name: value for name, value in config.items() if name not in silent}, "_class_name": STOCK_CLASS}


def grid_indices(levels: np.ndarray, grid: np.ndarray) -> list[int] | None:
    """See [`ConsistencyScheduler.stock_timesteps`]."""
    indices = np.abs(np.log(grid) - np.log(levels)[:, None]).argmin(axis=1)
    starts_at_top = indices[0] == 0  # as diffusers' own class does whatever its indices say
    return indices[::-1].tolist() if starts_at_top and np.allclose(grid[indices], levels, rtol=1e-5) else None


# LCMScheduler --------------------------------------------------------------------------------------------------------


def lcm_scheduler(config: Mapping[str, Any], preconditioning: Preconditioning) -> LCMScheduler:
    """See [`ConsistencyScheduler.to_lcm`].

    Args:
        config (`Mapping`): of a [`ConsistencyScheduler`].
        preconditioning ([`Preconditioning`]): of its network.
    """
    default = inspect.signature(LCMScheduler).parameters["original_inference_steps"].default
    steps = config["original_inference_steps"] or min(default, config["num_train_timesteps"])
    if reasons := _differences(config, preconditioning, steps):
        raise ValueError(f"LCMScheduler does not compute this student: {'; '.join(reasons)}.")
    return LCMScheduler(
        **{name: config[name] for name in BETA_FIELDS.split()}, original_inference_steps=steps,
        prediction_type=config["prediction_type"] or "epsilon", timestep_scaling=config["timestep_scaling"],
        clip_sample=config["clip_denoised"], clip_sample_range=config["image_range"][1],
        steps_offset=1,  # which it does not use, and without which Stable Diffusion's pipeline warns
    )  # fmt: skip


def _differences(config: Mapping[str, Any], preconditioning: Preconditioning, steps: int) -> list[str]:
    """What keeps an `LCMScheduler` of that many original steps from computing a student."""
    if config["family"] != "vp" or config["boundary"] != "lcm":
        return [f"its family is {config['family']!r} and its boundary {config['boundary']!r}"]
    reasons = []
    low, high = config["image_range"]
    if low != -high:
        reasons.append(f"its images lie in {[low, high]}, the middle of which is not 0")
    for name, only in (("sigma_data", 0.5), ("s_noise", 1.0)):
        if config[name] != only:
            reasons.append(f"its {name} is {config[name]}, and LCMScheduler's {only}")
    if config["trained_betas"] is None and config["beta_schedule"] not in LCM_BETA_SCHEDULES:
        reasons.append(f"its betas are {config['beta_schedule']!r}, none of {', '.join(LCM_BETA_SCHEDULES)}")
    ends = np.array([SamplingLevels(config, preconditioning).grid[0], config["sigma_min"]])
    start, identity = preconditioning.c_noise(torch.from_numpy(ends)).tolist()
    first = original_timesteps(config["num_train_timesteps"], steps)[0]
    if abs(start - first) > 0.01:
        reasons.append(f"it was trained up to timestep {start:.1f}, and LCMScheduler starts at {first}")
    if identity > 0.01:
        reasons.append(f"it is the identity at timestep {identity:.1f}, and LCMScheduler at 0")
    return reasons
