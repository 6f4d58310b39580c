"""From a config, a teacher and whatever data there is: the student, its scheduler, and a dataset that fits them."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from diffusers import UNet2DModel

from cm_diffusers.network_config import check_size, height_and_width
from cm_diffusers.noise_levels import default_second_sigma, karras_grid
from cm_diffusers.preconditioning import VPPreconditioning
from cm_diffusers.schedulers import ConsistencyScheduler
from cm_diffusers.schedulers.scheduling_consistency import GRID_FAMILIES
from cm_diffusers.training.config import ConsistencyConfig
from cm_diffusers.training.data import load_image_dataset, prepare_dataset
from cm_diffusers.training.images import ImageSpec
from cm_diffusers.training.inputs import CachedInputs, Inputs, PixelInputs, TextInputs
from cm_diffusers.training.latent_cache import CachedLatents
from cm_diffusers.training.lora import with_adapters
from cm_diffusers.training.runtime import in_precision
from cm_diffusers.training.schedules import default_learning_rate, grid_length
from cm_diffusers.training.student import add_guidance, add_second_time, cut_variance, make_student
from cm_diffusers.training.teacher import Teacher, check_network, load_teacher
from cm_diffusers.training.text_cache import check_cache, is_cache, open_cache
from cm_diffusers.training.text_to_image import TextToImage

# At 1280 channels LCM-LoRA learns with 1e-4, five times the rate for all weights.
ADAPTERS_LEARN_FASTER = 5


def load_teacher_of(config: ConsistencyConfig, source: Any) -> Teacher:
    """The teacher of a run, `source` as for `load_teacher`; adapters need no network in float32 to begin with."""
    dtype = getattr(torch, config.teacher_dtype) if config.lora_rank else torch.float32
    return load_teacher(source, config.teacher_revision, config.teacher_prediction_type, dtype)


def prepare_teacher(config: ConsistencyConfig, source: Any, precision: str) -> Teacher | None:
    """The teacher of a run; its weights are a student's of adapters, too, and then in `teacher_dtype` from the start.

    Args:
        source (*optional*): as for `load_teacher`.
        precision (`str`): of the run's passes forward.

    Raises:
        `ValueError`: if there is none where one is needed, or a network beside it, or adapters could not be trained
            on it.
    """
    if source is not None and config.unet_config is not None:
        raise ValueError("`unet_config` is for training without a teacher: of one, the student is a copy.")
    if source is None:
        if config.source == "teacher":
            raise ValueError(f"`method={config.method!r}` needs a `teacher`.")
        return None
    teacher = load_teacher_of(config, source)
    if config.source == "teacher" and teacher.is_consistency_model:
        raise ValueError(
            f"The teacher's scheduler, {type(teacher.scheduler).__name__}, is a consistency model's: it jumps, and "
            "knows no ODE to be distilled. To go on with its training, take a method that learns from data."
        )
    if config.lora_rank:
        if config.teacher_dtype != "float32" and precision == "no":
            raise ValueError(
                f"`lora_rank` with `teacher_dtype={config.teacher_dtype!r}` needs `mixed_precision`: adapters are in "
                "float32, and their network is not."
            )
        teacher.unet = in_precision(teacher.unet, config)
    if config.adversarial_weight and config.teacher_dtype == "float16" and precision != "fp16":
        raise ValueError(
            "`adversarial_weight` with `teacher_dtype='float16'` needs `mixed_precision='fp16'`, whose loss scale "
            "keeps the gradient through the teacher from vanishing. bfloat16 needs none."
        )
    return teacher


def prepare_student(config: ConsistencyConfig, teacher: Teacher | None) -> tuple[Any, ConsistencyScheduler]:
    """A student of the teacher, or a new network, with its scheduler.

    Raises:
        `ValueError`: if there is neither a teacher nor `unet_config`, or for values that the teacher does not allow.
    """
    names = ("boundary", "sigma_min", "sigma_max", "few_step_sigmas", "flow_map")
    overrides = {name: value for name in names if (value := getattr(config, name)) is not None}
    unet: Any
    if teacher is not None:
        unet, scheduler = _student_of(config, teacher, overrides)
    elif config.unet_config is not None:
        unet = new_network(config.unet_config)
        if config.flow_map:
            add_second_time(unet)
        if config.levels == "continuous":
            overrides |= {"family": "edm"}  # whose time is smooth
        scheduler = ConsistencyScheduler(**overrides)
    else:
        raise ValueError("Training without a teacher needs `unet_config`, the config of a UNet2DModel.")
    size = _asked_size(config, None if teacher is None else teacher.text) or unet.config.sample_size or 64
    return unet, _describe_training(config, scheduler, size)


def new_network(place: str) -> UNet2DModel:
    """A network with random weights, from the folder or file of its config.

    Raises:
        `ValueError`: if it is none that the students of no teacher can have.
    """
    unet = UNet2DModel.from_config(UNet2DModel.load_config(place))
    check_network(unet)
    if unet.config.time_embedding_type == "fourier":
        raise ValueError(
            "`unet_config` with `time_embedding_type='fourier'` is not supported: such a network takes the logarithm "
            "of its time, and that of a new one is a logarithm already. Take 'positional'."
        )
    cut_variance(unet)
    return unet


def _student_of(
    config: ConsistencyConfig, teacher: Teacher, overrides: dict[str, Any]
) -> tuple[Any, ConsistencyScheduler]:
    convert, smooth = config.conversion_steps != 0, config.levels == "continuous"
    unet: Any = None
    if config.lora_rank:
        convert = False
        unet = with_adapters(teacher.unet, config.lora_rank, config.lora_alpha, config.lora_targets, config.dora)
    if teacher.text is not None:
        overrides = {**overrides, "clip_denoised": False}
    if config.levels == "skipping":
        overrides = {**overrides, "original_inference_steps": _skips(config, teacher)}
    unet, scheduler = make_student(teacher.unet, teacher.scheduler, convert, smooth, unet, **overrides)
    if config.w_min is not None:
        add_guidance(unet)
    return unet, scheduler


def _skips(config: ConsistencyConfig, teacher: Teacher) -> int:
    """How many levels there are, where so many timesteps lie between them."""
    interval, timesteps = config.skip_interval or 1, getattr(teacher.scheduler.config, "num_train_timesteps", 0)
    if not isinstance(teacher.preconditioning, VPPreconditioning) or timesteps % interval:
        raise ValueError(
            f"`skip_interval={interval}` needs a variance-preserving teacher whose timesteps it divides; "
            f"{type(teacher.scheduler).__name__} has {timesteps}."
        )
    return int(timesteps // interval)


def _asked_size(config: ConsistencyConfig, text: TextToImage | None) -> int | None:
    """The size of the network's images that the config asks for, if it does."""
    if config.resolution is None or text is None:
        return config.resolution
    return latent_size(config.resolution, text)


def latent_size(resolution: int, text: TextToImage) -> int:
    """The size of latents of pictures of a resolution.

    Raises:
        `ValueError`: if the resolution is none that the VAE can halve as often as it does.
    """
    if resolution % text.shrinks_by:
        raise ValueError(f"`resolution` must be a multiple of the VAE's {text.shrinks_by}, got {resolution}.")
    return resolution // text.shrinks_by


def _describe_training(config: ConsistencyConfig, scheduler: ConsistencyScheduler, size: Any) -> ConsistencyScheduler:
    """The scheduler with the grid that the student ends its training on, and a second level out of it.

    Of levels on no grid it is out of the one that stock diffusers has, where that runs the student.
    """
    now = scheduler.config
    if config.levels == "skipping":
        return scheduler  # whose few steps are LCM's
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
    elif scheduler.is_stock:
        length = scheduler.grid_length
    if length is not None:
        grid = karras_grid(length, now.sigma_min, now.sigma_max, now.rho)
        allowed = [sigma for sigma in grid[1:-1].tolist() if sigma >= (config.truncation or 0)]
        second = min(allowed, key=lambda sigma: abs(math.log(sigma / second)), default=0.0)
    if now.few_step_sigmas is None and now.sigma_min < second < now.sigma_max:
        changes["few_step_sigmas"] = {"2": [now.sigma_max, second]}
    return ConsistencyScheduler.from_config({**now, **changes, "_use_default_values": []})


def check_steps(config: ConsistencyConfig, scheduler: ConsistencyScheduler) -> None:
    """Refuse numbers of sampling steps that the student could not take."""
    scheduler = ConsistencyScheduler.from_config(scheduler.config)
    sampled, evaluated = config.sample_nfes * bool(config.sample_steps), config.eval_nfes * bool(config.eval_steps)
    for name, nfes in (("sample_nfes", sampled), ("eval_nfes", evaluated)):
        for nfe in nfes:
            try:
                scheduler.set_timesteps(nfe)
            except ValueError as error:
                raise ValueError(f"`{name}` holds {nfe}, which the student cannot take: {error}") from error


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
    rate = default_learning_rate(max(channels)) * (ADAPTERS_LEARN_FASTER if config.lora_rank else 1)
    return dataclasses.replace(
        config, learning_rate=config.learning_rate or rate,
        conversion_learning_rate=config.conversion_learning_rate or 3 * rate,
    )  # fmt: skip


def prepare_data(
    config: ConsistencyConfig, dataset: Any, unet: Any, scheduler: ConsistencyScheduler, accelerator: Accelerator,
    text: TextToImage | None = None,
) -> Any:  # fmt: skip
    """The dataset given, or the config's, as the network takes it. Called by all processes.

    Args:
        text ([`~cm_diffusers.training.text_to_image.TextToImage`], *optional*): what makes latents of pictures, and
            reads their captions.

    Raises:
        `TypeError`, `ValueError`: for data that cannot be found or does not fit.
    """
    num_classes = unet.config.num_class_embeds if text is None else None
    _check_labels(config, num_classes)
    if config.distance == "lpips" and unet.config.in_channels not in (1, 3):
        raise ValueError(f"`distance='lpips'` compares grey or RGB images, not {unet.config.in_channels} channels.")
    dataset = load_data(config, accelerator) if dataset is None else dataset
    spec = _image_spec(config, unet, scheduler, text)
    if isinstance(dataset, CachedLatents):
        return check_cache(config, dataset, spec, text)
    return prepare_dataset(
        dataset, spec, image_column=config.image_column, label_column=config.label_column,
        caption_column=config.caption_column, captioned=text is not None, on_bad_image=config.on_bad_image,
        num_classes=num_classes,
    )  # fmt: skip


def load_data(config: ConsistencyConfig, processes: Any) -> Any:
    """The dataset that the config names: one of `datasets`, or a cache of latents. Called by all processes.

    Args:
        processes (`Accelerator` or `PartialState`): that are all of them.

    Raises:
        `ValueError`: if there is none, it cannot be loaded, or a cache is not whole.
    """
    if config.dataset is None:
        raise ValueError("Training needs a `dataset`.")
    if is_cache(config.dataset):
        return open_cache(config.dataset, processes)
    with processes.main_process_first():
        return load_image_dataset(
            config.dataset, name=config.dataset_name, split=config.dataset_split, streaming=config.streaming,
            data_files=config.data_files,
        )  # fmt: skip


def _image_spec(
    config: ConsistencyConfig, unet: Any, scheduler: ConsistencyScheduler, text: TextToImage | None
) -> ImageSpec:
    """The images of the dataset; the network learns their size."""
    if (size := _asked_size(config, text)) is not None:
        unet.register_to_config(sample_size=size)
    if text is not None:
        return picture_spec(config, text)
    height, width = _sample_size(unet)
    check_size(unet.config, height, width)
    options = (scheduler.config.image_range, config.center_crop, config.random_flip)
    return ImageSpec(unet.config.in_channels, height, width, *options)


def picture_spec(config: ConsistencyConfig, text: TextToImage) -> ImageSpec:
    """The pictures of which a run from text to images makes latents.

    Raises:
        `ValueError`: if the config's resolution does not suit the VAE.
    """
    if config.resolution is None:
        height, width = (length * text.shrinks_by for length in _sample_size(text.pipeline.unet))
    else:
        height = width = latent_size(config.resolution, text) * text.shrinks_by
    return ImageSpec(text.image_channels, height, width, (-1.0, 1.0), config.center_crop, config.random_flip)


def _sample_size(unet: Any) -> tuple[int, int]:
    if unet.config.sample_size is None:
        raise ValueError("The network's config has no `sample_size`: set `resolution`.")
    return height_and_width(unet.config.sample_size)


def _check_labels(config: ConsistencyConfig, num_classes: int | None) -> None:
    for name in ("label_column", "null_class_label"):
        if num_classes is None and getattr(config, name) is not None:
            raise ValueError(f"`{name}` was given, but the network is not class-conditional.")
    if config.null_class_label is not None and not 0 <= config.null_class_label < (num_classes or 0):
        raise ValueError(
            f"`null_class_label` must be one of the network's {num_classes} classes, got {config.null_class_label}."
        )


def make_inputs(config: ConsistencyConfig, teacher: Teacher | None, unet: Any, dataset: Any) -> Inputs:
    """How a run reads the batches of its prepared dataset."""
    if teacher is None or teacher.text is None:
        is_conditional = unet.config.num_class_embeds is not None
        return PixelInputs(is_conditional, config.label_dropout, config.null_class_label)
    guidance = None if config.w_min is None or config.w_max is None else (config.w_min + 1, config.w_max + 1)
    kind = CachedInputs if isinstance(dataset, CachedLatents) else TextInputs
    return kind(teacher.text, config.caption_dropout, guidance)


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
