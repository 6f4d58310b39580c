"""Published checkpoints, of consistency models and of their EDM teachers, as diffusers pipelines."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from diffusers import ConsistencyModelPipeline, DiffusionPipeline
from torch import Tensor

from cm_diffusers.importing.architecture import read_architecture
from cm_diffusers.importing.edm import convert_network
from cm_diffusers.importing.openai import PUBLISHED_TRAITS, Traits, convert_unet
from cm_diffusers.importing.unpickling import load_pickled_network, load_state_dict
from cm_diffusers.noise_levels import karras_sigmas
from cm_diffusers.pipelines import ConsistencyPipeline
from cm_diffusers.schedulers import ConsistencyScheduler, ScaledTimeEDMScheduler

KINDS = ("cd", "ct", "edm")
PICKLE_SUFFIXES = (".pkl", ".pickle")


class _Grid(NamedTuple):
    """A published model's noise levels: how many, and the index of the second of two steps."""

    num_levels: int
    second: int | None


# The two-step schedules are those of scripts/launch.sh in the consistency_models repository.
PUBLISHED_GRIDS = {
    "cd_imagenet64_l2": _Grid(40, 22),
    "cd_imagenet64_lpips": _Grid(40, 22),
    "ct_imagenet64": _Grid(201, 106),
    "cd_bedroom256_l2": _Grid(40, 18),
    "cd_bedroom256_lpips": _Grid(40, 17),
    "ct_bedroom256": _Grid(151, 67),
    "cd_cat256_l2": _Grid(40, None),
    "cd_cat256_lpips": _Grid(40, None),
    "ct_cat256": _Grid(151, 62),
}


def import_checkpoint(
    path: str | os.PathLike,
    kind: str | None = None,
    image_size: int | None = None,
    attention_head_dim: int | None = None,
    qkv_order: str | None = None,
    num_train_timesteps: int | None = None,
) -> DiffusionPipeline:
    """A diffusers pipeline from a checkpoint of OpenAI's consistency_models or NVlabs' edm repository.

    Nothing that a file asks to run is run. NVlabs' pickles say all of themselves. OpenAI's `.pt` files do not: one of
    a published architecture is taken to have the published model's heads and image size, and one of a published name
    its noise levels; for others the options say what the weights do not show.

    Args:
        path (`str` or `os.PathLike`): a `.pt` file (`cd_*`, `ct_*`, `edm_*`) or an NVlabs pickle (`edm-*.pkl`).
        kind (`str`, *optional*): `"cd"` or `"ct"` for a consistency model, `"edm"` for a diffusion model; what the
            file's name begins with when `None`.
        image_size (`int`, *optional*): height and width in pixels.
        attention_head_dim (`int`, *optional*): channels of an attention head.
        qkv_order (`str`, *optional*): `"new"` or `"legacy"`, OpenAI's `use_new_attention_order` on or off.
        num_train_timesteps (`int`, *optional*): length of the Karras grid that a consistency model was trained on.

    Returns:
        [`ConsistencyPipeline`] for a consistency model, which is saved as diffusers' own pipeline; for a diffusion
        model a `ConsistencyModelPipeline` with an EDM scheduler, which samples by Euler steps and is a teacher.

    Raises:
        `ValueError`: if the file holds more than weights, its network cannot be represented exactly, or an option that
            it needs is missing.
    """
    options = {
        "kind": kind, "image_size": image_size, "attention_head_dim": attention_head_dim, "qkv_order": qkv_order,
        "num_train_timesteps": num_train_timesteps,
    }  # fmt: skip
    if Path(path).suffix.lower() in PICKLE_SUFFIXES:
        given = [f"`{name}`" for name, value in options.items() if value is not None]
        if given:
            raise ValueError(f"A pickled network says all of itself: {', '.join(given)} cannot be given.")
        unet, scheduler = convert_network(load_pickled_network(path))
        return ConsistencyModelPipeline(unet, scheduler)
    kind = kind or _kind_of(path)
    if kind not in KINDS:
        raise ValueError(f"`kind` must be one of {', '.join(KINDS)}, got {kind!r}.")
    if kind == "edm" and num_train_timesteps is not None:
        raise ValueError("A diffusion model has no grid of noise levels: `num_train_timesteps` cannot be given.")
    grid = None if kind == "edm" else _read_grid(Path(path).stem, kind, num_train_timesteps)
    weights = load_state_dict(path)
    unet = convert_unet(weights, _read_traits(weights, options))
    if grid is None:
        return ConsistencyModelPipeline(unet, ScaledTimeEDMScheduler())
    return ConsistencyPipeline(unet, _consistency_scheduler(grid))


def _kind_of(path: str | os.PathLike) -> str:
    match = re.match(r"(cd|ct|edm)_", Path(path).name)
    if match is None:
        raise ValueError(
            f"The name of {path} does not begin with cd_, ct_ or edm_: say by `kind` what it is, one of "
            f"{', '.join(KINDS)}."
        )
    return match[1]


def _read_grid(stem: str, kind: str, num_levels: int | None) -> _Grid:
    published = PUBLISHED_GRIDS.get(stem)
    if published is not None and num_levels in (None, published.num_levels):
        return published
    if num_levels is None:
        raise ValueError(
            f"{stem} is none of the published {kind} models ({', '.join(PUBLISHED_GRIDS)}): `num_train_timesteps`, "
            "the number of noise levels it was trained on, is needed."
        )
    return _Grid(num_levels, None)


def _read_traits(weights: dict[str, Tensor], options: dict[str, Any]) -> Traits:
    """The published values for a published architecture, under the options given."""
    architecture = read_architecture(weights)
    published = PUBLISHED_TRAITS.get(architecture)
    values: dict[str, Any] = {
        name: options[name] if options[name] is not None else getattr(published, name, None)
        for name in ("image_size", "attention_head_dim", "qkv_order")
    }
    missing = [f"`{name}`" for name, value in values.items() if value is None]
    if missing:
        raise ValueError(f"{architecture} is no published model's: {', '.join(missing)} must be given.")
    return Traits(**values)


def _consistency_scheduler(grid: _Grid) -> ConsistencyScheduler:
    scheduler = ConsistencyScheduler(num_train_timesteps=grid.num_levels)
    if grid.second is None:
        return scheduler
    low, high = scheduler.config.sigma_min, scheduler.config.sigma_max
    second = float(karras_sigmas(np.array(grid.second / (grid.num_levels - 1)), low, high, scheduler.config.rho))
    return ConsistencyScheduler(num_train_timesteps=grid.num_levels, few_step_sigmas={"2": [high, second]})
