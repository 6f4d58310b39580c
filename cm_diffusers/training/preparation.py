"""From a config, a teacher and whatever data there is: the student, its scheduler, and a dataset that fits them."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object
from diffusers import UNet2DModel

from cm_diffusers.network_config import height_and_width
from cm_diffusers.noise_levels import default_second_sigma, karras_grid
from cm_diffusers.schedulers import ConsistencyScheduler
from cm_diffusers.schedulers.scheduling_consistency import GRID_FAMILIES
from cm_diffusers.training.config import ConsistencyConfig
from cm_diffusers.training.data import load_image_dataset, prepare_dataset
from cm_diffusers.training.images import ImageSpec
from cm_diffusers.training.schedules import default_learning_rate, grid_length
from cm_diffusers.training.student import add_second_time, make_student
from cm_diffusers.training.teacher import Teacher


def prepare_student(config: ConsistencyConfig, teacher: Teacher | None) -> tuple[Any, ConsistencyScheduler]:
    """A student of the teacher, or a new network, with its scheduler.

    Raises:
        `ValueError`: if there is neither a teacher nor `unet_config`, or for values that the teacher does not allow.
    """
    names = ("boundary", "sigma_min", "sigma_max", "few_step_sigmas", "flow_map")
    overrides = {name: value for name in names if (value := getattr(config, name)) is not None}
    unet: Any
    if teacher is not None:
        convert, smooth = config.conversion_steps != 0, config.levels == "continuous"
        unet, scheduler = make_student(teacher.unet, teacher.scheduler, convert, smooth, **overrides)
    elif config.unet_config is not None:
        unet = UNet2DModel.from_config(UNet2DModel.load_config(config.unet_config))
        if config.flow_map:
            add_second_time(unet)
        if config.levels == "continuous":
            overrides |= {"family": "edm"}  # whose time is smooth
        scheduler = ConsistencyScheduler(**overrides)
    else:
        raise ValueError("Training without a teacher needs `unet_config`, the config of a UNet2DModel.")
    return unet, _describe_training(config, scheduler, config.resolution or unet.config.sample_size or 64)


def _describe_training(config: ConsistencyConfig, scheduler: ConsistencyScheduler, size: Any) -> ConsistencyScheduler:
    """The scheduler with the grid that the student ends its training on, and a second level out of it."""
    now = scheduler.config
    length, second = grid_length(config), default_second_sigma(height_and_width(size)[0])
    changes: dict[str, Any] = {}
    if config.truncation is not None:
        if not 1.01 * now.sigma_min < config.truncation < now.sigma_max:
            raise ValueError(
                f"`truncation` must lie between sigma_min={now.sigma_min:g} and sigma_max={now.sigma_max:g}, got "
                f"{config.truncation:g}."
            )
        changes["sigma_lowest"], second = config.truncation, max(second, config.truncation)
    if length is not None:
        changes["num_train_timesteps" if now.family in GRID_FAMILIES else "num_levels"] = length
        grid = karras_grid(length, now.sigma_min, now.sigma_max, now.rho)
        second = min(grid[1:-1].tolist(), key=lambda sigma: abs(math.log(sigma / second)), default=0.0)
    if now.few_step_sigmas is None and now.sigma_min < second < now.sigma_max:
        changes["few_step_sigmas"] = {"2": [now.sigma_max, second]}
    return ConsistencyScheduler.from_config({**now, **changes, "_use_default_values": []})


def with_learning_rates(config: ConsistencyConfig, unet: Any) -> ConsistencyConfig:
    """The config with the learning rates that it leaves open, after the student's width.

    Raises:
        `ValueError`: if the network's config does not say how wide it is.
    """
    if None not in (config.learning_rate, config.conversion_learning_rate):
        return config
    channels = getattr(unet.config, "block_out_channels", None)
    if channels is None:
        raise ValueError("The network's config has no `block_out_channels`: set both learning rates.")
    rate = default_learning_rate(max(channels))
    return dataclasses.replace(
        config, learning_rate=config.learning_rate or rate,
        conversion_learning_rate=config.conversion_learning_rate or 3 * rate,
    )  # fmt: skip


def prepare_data(
    config: ConsistencyConfig, dataset: Any, unet: Any, scheduler: ConsistencyScheduler, accelerator: Accelerator
) -> Any:
    """The dataset given, or the config's, as the network takes it. Called by all processes.

    Raises:
        `TypeError`, `ValueError`: for data that cannot be found or does not fit.
    """
    if dataset is None:
        if config.dataset is None:
            raise ValueError("Training needs a `dataset`.")
        with accelerator.main_process_first():
            dataset = load_image_dataset(
                config.dataset, name=config.dataset_name, split=config.dataset_split, streaming=config.streaming,
                data_files=config.data_files,
            )  # fmt: skip
    size = config.resolution or unet.config.sample_size
    if size is None:
        raise ValueError("The network's config has no `sample_size`: set `resolution`.")
    height, width = height_and_width(size)
    unet.register_to_config(sample_size=size)
    low, high = scheduler.config.image_range
    spec = ImageSpec(unet.config.in_channels, height, width, (low, high), config.center_crop, config.random_flip)
    num_classes = unet.config.num_class_embeds
    for name in ("label_column", "null_class_label"):
        if num_classes is None and getattr(config, name) is not None:
            raise ValueError(f"`{name}` was given, but the network is not class-conditional.")
    if config.null_class_label is not None and not 0 <= config.null_class_label < num_classes:
        raise ValueError(
            f"`null_class_label` must be one of the network's {num_classes} classes, got {config.null_class_label}."
        )
    return prepare_dataset(
        dataset, spec, image_column=config.image_column, label_column=config.label_column,
        on_bad_image=config.on_bad_image, num_classes=num_classes,
    )  # fmt: skip


def identify_scheduler(scheduler: ConsistencyScheduler) -> dict[str, Any]:
    """What tells the function that a student learns from another: its scheduler's config without sampling's levels."""
    config = json.loads(scheduler.to_json_string())
    return {name: value for name, value in config.items() if name[0] != "_" and name != "few_step_sigmas"}


def identify(dataset: Any) -> dict[str, Any]:
    """What tells a prepared dataset from another. Called by all processes.

    Raises:
        `ValueError`: if they do not have the same.
    """
    identities: list[dict[str, Any]] = gather_object([dataset.identity()])
    for rank, identity in enumerate(identities):
        if identity != identities[0]:
            raise ValueError(f"Process {rank} has other data than the first: {identity}, not {identities[0]}.")
    return identities[0]
