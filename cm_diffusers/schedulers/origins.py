"""Where a student's scheduler comes from: the scheduler of its teacher, or diffusers' own of a published student."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from diffusers import LCMScheduler

from cm_diffusers.network_config import (
    CONSISTENCY_SCHEDULERS,
    SUPPORTED_SCHEDULERS,
    describe_network,
    preconditioning_from_config,
)
from cm_diffusers.schedulers.sampling_levels import GRID_FAMILIES, SLACK

LCM_CLASS = "LCMScheduler"
TEACHER_CLASSES = SUPPORTED_SCHEDULERS - CONSISTENCY_SCHEDULERS
# Which the schedulers of consistency models have not, or not without a `family`.
TEACHER_FIELDS = {"prediction_type", "shift", "snr"}


def fields_from_teacher(config: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """See [`ConsistencyScheduler.from_teacher`].

    Args:
        config (`Mapping`): of the teacher's scheduler, with its `_class_name`.
        overrides (`Mapping`): fields of the student's; `None` is not given.
    """
    fields = describe_network(config)
    low, high = preconditioning_from_config(fields).sigma_range
    overrides = {key: value for key, value in overrides.items() if value is not None}
    own_grid = fields["family"] in GRID_FAMILIES
    if overrides.get("family", fields["family"]) != fields["family"]:
        for name in ("prediction_type", "time_scale"):  # say nothing of another family
            fields.pop(name, None)
    whole = overrides.get("boundary") == "lcm" or "original_inference_steps" in overrides  # as LCMScheduler has it
    defaults = {
        "boundary": "edm" if own_grid else "euler",
        "sigma_min": low if whole else max(0.002, low),
        "sigma_max": high if whole else min(80.0, high),
        "clip_denoised": bool(config.get("clip_sample", True)),
    }
    fields = {**fields, **defaults, **overrides}
    # The ends of a discrete schedule are irrational.
    if fields["sigma_min"] * SLACK < low or fields["sigma_max"] > high * SLACK:
        raise ValueError(
            f"The range of sigma [{fields['sigma_min']:g}, {fields['sigma_max']:g}] leaves the teacher's, "
            f"[{low:g}, {high:g}]: it has never seen such noise. Choose `sigma_min` and `sigma_max` inside."
        )
    return fields


def name_of_teacher(config: Mapping[str, Any]) -> str | None:
    """Whose a config is, if it is that of a diffusion model's scheduler. One that was never saved has no class."""
    name = config.get("_class_name")
    if name is None and "family" not in config:
        return "a diffusion model's" if TEACHER_FIELDS & config.keys() else None
    return f"a {name}'s" if isinstance(name, str) and name in TEACHER_CLASSES else None


def is_lcm(config: Mapping[str, Any]) -> bool:
    """Whether a config is an `LCMScheduler`'s. That of one which was never saved does not say its class."""
    if "_class_name" in config:
        return bool(config["_class_name"] == LCM_CLASS)
    return "family" not in config and {"original_inference_steps", "timestep_scaling"} <= config.keys()


def fields_from_lcm(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a [`ConsistencyScheduler`] that computes what an `LCMScheduler` does.

    `set_alpha_to_one`, `steps_offset` and `timestep_spacing` change nothing in it, nor do fields that are left over
    from the scheduler whose config it was made from.

    Args:
        config (`Mapping`): of an `LCMScheduler`, with its defaults or without.

    Raises:
        `ValueError`: if it cannot be represented, saying why.
    """
    # diffusers takes what was passed by position for a default, and would replace it.
    filled = LCMScheduler.from_config({**config, "_use_default_values": []}).config
    own = {name: filled[name] for name in inspect.signature(LCMScheduler).parameters}
    if own["thresholding"]:
        raise ValueError("An LCMScheduler with `thresholding=True` cannot be represented: ConsistencyScheduler clips.")
    fields = describe_network({"_class_name": LCM_CLASS, **own})
    sigma_min, sigma_max = preconditioning_from_config(fields).sigma_range
    return {
        **fields,
        "boundary": "lcm",
        "sigma_min": sigma_min,
        "sigma_max": sigma_max,
        "timestep_scaling": own["timestep_scaling"],
        "original_inference_steps": own["original_inference_steps"],
        "clip_denoised": own["clip_sample"],
        "image_range": [-own["clip_sample_range"], own["clip_sample_range"]],
    }
