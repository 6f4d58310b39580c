"""The configuration of a training run: one dataclass, whose methods are named choices of five parts."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_type_hints

from cm_diffusers.training.config_checks import check_choices, check_numbers, without_effect
from cm_diffusers.training.config_values import coerce, read_yaml, unknown_key
from cm_diffusers.training.methods import CONTINUOUS, METHODS


def _option(default: Any, help: str) -> Any:
    if isinstance(default, dict | list):
        return field(default_factory=lambda: default, metadata={"help": help})
    return field(default=default, metadata={"help": help})


@dataclass
class ConsistencyConfig:
    """Everything a training run depends on besides the teacher and the data.

    Fields that are `None` take the method's choice or the teacher's own value. Noise levels are in the units of the
    images, steps are optimiser steps, half-lives are in images.

    Raises:
        `ValueError`: for values out of range or choices that do not go together.
    """

    method: Literal["cd", "ct", "ict", "ect", "ecd", "tcm", "sct", "scd", "meanflow", "lcm"] = _option(
        "cd", "cd, ecd, scd, lcm: distil a teacher; ct, ict, ect, tcm, sct, meanflow: train on data"
    )

    # The teacher
    teacher: str | None = _option(None, "folder or Hub id of the teacher's pipeline")
    teacher_revision: str | None = _option(None, "branch, tag or commit of the teacher on the Hub")
    teacher_prediction_type: str | None = _option(
        None, "replaces the prediction type in the teacher's scheduler config"
    )
    teacher_check: bool = _option(True, "first test on real images that the teacher is read correctly")
    guidance_scale: float | None = _option(
        None, "classifier-free guidance of the teacher's steps; by default 8.5 from text to images, and else 1: off"
    )
    w_min: float | None = _option(
        None, "from text to images, with w_max: the student is told the guidance, of a scale between w_min + 1 ..."
    )
    w_max: float | None = _option(None, "... and w_max + 1; by default 5 to 15 for `lcm` without `lora_rank`")
    null_class_label: int | None = _option(None, "the label that stands for 'no class'")
    label_dropout: float = _option(
        0.0, "share of labels replaced by null_class_label, so that the student can be guided"
    )
    caption_dropout: float = _option(0.0, "share of captions left empty, so that the student can be guided")

    # The student
    unet_config: str | None = _option(
        None, "to learn from data without a teacher: a UNet2DModel config to initialise at random"
    )
    boundary: Literal["edm", "euler", "lcm"] | None = _option(None, "boundary form; by default what suits the teacher")
    sigma_min: float | None = _option(None, "where the consistency function is the identity")
    sigma_max: float | None = _option(None, "where sampling starts")
    conversion_steps: int | None = _option(
        None,
        "steps that first teach a student to predict v, or to see a smooth time; by default a tenth if needed",
    )
    conversion_learning_rate: float | None = _option(
        None,
        "peak learning rate of the conversion, which decays to 0; by default three times `learning_rate`'s default",
    )
    few_step_sigmas: dict[str, list[float]] | None = _option(
        None, "noise levels stored for few-step sampling, as {2: [80, 0.8]}; by default a second one after the size"
    )

    lora_rank: int | None = _option(None, "train adapters of this rank, from text to images, instead of all weights")
    lora_alpha: int | None = _option(None, "adapters count alpha / rank; by default 1")
    lora_targets: list[str] | None = _option(
        None, "layers with adapters, by the ends of their names; by default LCM's"
    )
    dora: bool = _option(False, "adapters that also train the size of each output")

    # The five choices
    levels: Literal["fixed", "progressive", "doubling", "mapping", "continuous", "skipping"] | None = _option(
        None,
        "the lower level of a pair: the next of N(k) on a grid, mapped from the higher one, its limit, or so many "
        "timesteps below",
    )
    skip_interval: int | None = _option(None, "timesteps from one level to the next, for skipping levels")
    num_levels: int | None = _option(None, "N, for fixed levels")
    s0: int | None = _option(None, "first number of intervals, for progressive and doubling levels")
    s1: int | None = _option(None, "last number of intervals, for progressive and doubling levels")
    stages: int | None = _option(None, "so many times the gap of mapped levels shrinks")
    mapping_base: float | None = _option(None, "... by this factor")
    level_distribution: Literal["uniform", "lognormal"] | None = _option(None, "how a pair of levels is drawn")
    p_mean: float | None = _option(None, "mean of ln sigma, for lognormal draws")
    p_std: float | None = _option(None, "standard deviation of ln sigma, for lognormal draws")
    source: Literal["teacher", "data"] | None = _option(None, "where the lower point comes from")
    solver: Literal["euler", "heun"] | None = _option(None, "the teacher's ODE step")
    target: Literal["ema", "student"] | None = _option(None, "which weights answer at the lower point")
    mu: float | None = _option(
        None, "decay of the target EMA per step (mu0 of 800,000 steps for the progressive schedule); 0 is none"
    )
    mu_schedule: Literal["fixed", "progressive"] | None = _option(
        None, "progressive: mu follows N(k), and the length of runs below 800,000 steps"
    )
    distance: Literal["l1", "l2", "lpips", "pseudo_huber", "huber"] | None = _option(
        None, "distance between two images; pseudo_huber takes the norm of their difference, huber each value"
    )
    huber_c: float | None = _option(
        None, "constant of the Huber distances; by default 0.00054 * sqrt(d) for pseudo_huber"
    )
    weighting: Literal["uniform", "inverse_gap", "adaptive"] | None = _option(
        None, "loss weight: 1, 1 / (sigma - sigma_lower), or learned so that all noise levels count the same"
    )

    # Of some methods
    truncation: float | None = _option(
        None, "second stage of tcm: a student of the noise levels above this one, whose target below is the first's"
    )
    first_stage_steps: int | None = _option(None, "steps before the truncation; by default half of the steps")
    flow_map: bool | None = _option(None, "a student that is told, as a second time, which lower level to jump to")
    tangent_warmup_steps: int | None = _option(
        None, "steps until continuous levels take in the network's derivative; by default a tenth, at most 10,000"
    )
    derivative: Literal["forward", "finite_difference"] | None = _option(
        None, "the network's, for continuous levels; by default forward mode, where nothing stands in its way"
    )
    real_data: float = _option(0.0, "part of each batch whose lower point comes from the data, not from the teacher")
    adversarial_weight: float = _option(0.0, "weight of a loss by which images must not be told from real ones")

    # Data
    dataset: str | None = _option(
        None, "Hub id, folder of images, parquet files, a saved dataset, or what `cm-diffusers precompute` wrote"
    )
    dataset_name: str | None = _option(None, "configuration of the dataset")
    data_files: list[str] | None = _option(
        None, "files or URLs of the dataset, with wildcards; with `dataset: webdataset`, its shards"
    )
    dataset_split: str = _option("train", "split of the dataset")
    streaming: bool = _option(False, "read the dataset as it comes, without downloading it first")
    image_column: str | None = _option(None, "column of images; found by itself when there is one")
    label_column: str | None = _option(None, "column of class labels, for class-conditional students")
    caption_column: str | None = _option(None, "column of captions, from text to images; found by itself")
    resolution: int | None = _option(None, "image size in pixels; by default the teacher's")
    center_crop: bool = _option(True, "crop in the middle rather than at random")
    random_flip: bool = _option(False, "mirror half of the images")
    on_bad_image: Literal["error", "skip"] = _option("error", "what a corrupt image does; either way it is named")
    num_workers: int = _option(0, "processes that load images")

    # Optimisation
    max_train_steps: int = _option(100_000, "steps of the method itself")
    batch_size: int = _option(64, "images per device and micro-step")
    gradient_accumulation_steps: int = _option(1, "micro-steps per step")
    optimizer: Literal["radam", "adam", "adamw"] = _option("radam", "optimiser")
    learning_rate: float | None = _option(
        None, "peak learning rate; by default 0.0256 / channels of the UNet where it is widest, 1e-3 at most"
    )
    lr_schedule: Literal["constant", "cosine", "linear"] = _option("cosine", "what follows the warm-up")
    lr_warmup_steps: int = _option(0, "steps of linear warm-up")
    adam_betas: list[float] = _option([0.9, 0.999], "decay rates of the optimiser's moments")
    weight_decay: float = _option(0.0, "decoupled for adamw")
    max_grad_norm: float | None = _option(1.0, "gradient clipping; none: off")
    mixed_precision: Literal["no", "fp16", "bf16"] | None = _option(None, "by default accelerate's own setting")
    allow_tf32: bool = _option(True, "float32 matrix products in TF32 on GPUs that have it")
    compile: bool = _option(False, "compile student, target and teacher with torch.compile")
    channels_last: bool = _option(False, "memory format; measure it: norms may cost what convolutions gain")
    gradient_checkpointing: bool = _option(False, "compute activations again in the backward pass, to save memory")
    teacher_dtype: Literal["float32", "bfloat16", "float16"] = _option("float32", "precision of the frozen teacher")
    max_bad_steps: int = _option(10, "so many steps in a row without a finite gradient end the run")
    distributed_timeout: float = _option(1800.0, "seconds that processes wait for each other before they give up")
    seed: int = _option(0, "seed of everything random")
    ema_half_life: float = _option(500_000, "half-life of the evaluation weights, in images")
    ema_rampup: float | None = _option(0.05, "limits the half-life to this part of the images seen; none: no limit")

    # Output
    output_dir: str = _option("outputs/student", "where the student, its checkpoints and its logs go")
    checkpoint_steps: int = _option(5_000, "steps between checkpoints; 0: none")
    checkpoint_limit: int = _option(2, "how many checkpoints are kept")
    resume: str | None = _option(
        None, "'auto' for the newest whole checkpoint of output_dir, or a checkpoint's folder"
    )
    logging_steps: int = _option(50, "steps between log entries")
    sample_steps: int = _option(1_000, "steps between sample grids; 0: none")
    num_samples: int = _option(16, "images in a sample grid")
    sample_prompts: list[str] | None = _option(None, "their prompts, in turn; by default the first captions")
    sample_nfes: list[int] = _option([1, 2], "numbers of steps to sample with")
    eval_steps: int = _option(0, "steps between evaluations against the training images; 0: none")
    eval_features: str = _option("inception", "feature network: inception, a classifier's folder, or module:function")
    eval_clip: str | None = _option(
        None, "from text to images: folder or Hub id of a CLIP model, whose score is measured, too"
    )
    eval_num_images: int = _option(1_000, "images drawn for an evaluation")
    eval_num_reference: int = _option(10_000, "training images they are compared with, spread evenly")
    eval_nfes: list[int] = _option([1], "numbers of steps to evaluate; the best student is the first one's")
    push_to_hub: bool = _option(False, "publish the student on the Hub when the run ends")
    hub_model_id: str | None = _option(None, "its name there; by default that of output_dir, under your account")
    hub_private_repo: bool | None = _option(None, "a new repository is private; by default your account's setting")
    hub_revision: str | None = _option(None, "branch to push to")
    hub_strategy: Literal["end", "checkpoint"] = _option("end", "push at the end, or with every checkpoint, too")
    hub_token: str | None = field(
        default=None, repr=False,
        metadata={"help": "by default that of `hf auth login` or HF_TOKEN; written nowhere"},
    )  # fmt: skip
    tracker: str = _option("tensorboard", "tracker of accelerate: tensorboard, wandb, ... or none")

    def __post_init__(self) -> None:
        for spec in dataclasses.fields(self):
            value = coerce(spec.name, getattr(self, spec.name), field_types())
            setattr(self, spec.name, value)
        check_numbers(self)

    def resolve(self, from_text: bool = False) -> ConsistencyConfig:
        """The config with the method's choices filled in, and checked against each other.

        Args:
            from_text (`bool`): whether images are made from text, out of latents. Only then do some options mean
                anything.
        """
        method = METHODS[self.method]
        choices = {**method, **(self._choices_from_text() if from_text else {"guidance_scale": 1.0})}
        if self.levels == "continuous" != method["levels"]:
            choices |= CONTINUOUS
        if self.distance not in (None, method["distance"]):
            choices["huber_c"] = None  # it belongs to the method's own distance
        choices = {name: value for name, value in choices.items() if getattr(self, name) is None}
        config = dataclasses.replace(self, **choices)
        while overridden := choices.keys() & without_effect(config).keys():  # of the method, by something else
            for name in overridden:
                setattr(config, name, None)
        if config.level_distribution == "lognormal":  # by default Song & Dhariwal's
            config.p_mean = -1.1 if config.p_mean is None else config.p_mean
            config.p_std = 2.0 if config.p_std is None else config.p_std
        if config.flow_map and config.boundary is None:
            config.boundary = "euler"
        check_choices(config, from_text)
        return config

    def _choices_from_text(self) -> dict[str, Any]:
        """What a method chooses where images are latents, and made from text."""
        chosen: dict[str, Any] = {}
        if METHODS[self.method].get("distance") == "lpips":  # which sees pictures
            chosen |= {"distance": "pseudo_huber", "weighting": "inverse_gap"}
        if METHODS[self.method]["source"] != "teacher" and self.source != "teacher":
            return chosen
        told = self.method == "lcm" and not self.lora_rank and self.guidance_scale is None
        if told or self.w_min is not None or self.w_max is not None:
            return {**chosen, "w_min": 5.0, "w_max": 15.0}
        return {**chosen, "guidance_scale": 8.5}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ConsistencyConfig:
        """A config from plain values; an unknown key is refused with the nearest valid name."""
        names = [spec.name for spec in dataclasses.fields(cls)]
        for key in values:
            if key not in names:
                raise ValueError(unknown_key(key, names))
        return cls(**values)

    @classmethod
    def from_yaml(cls, path: str | Path, **overrides: Any) -> ConsistencyConfig:
        """A config from a YAML file, with `overrides` on top."""
        return cls.from_dict({**read_yaml(path), **overrides})

    def hub_options(self) -> list[str]:
        """The names of the options of publishing that are set."""
        hub = (spec for spec in dataclasses.fields(self) if spec.name.startswith("hub_"))
        return [spec.name for spec in hub if getattr(self, spec.name) != spec.default]

    @property
    def hub_repository(self) -> str:
        """The name that the student has on the Hub."""
        return self.hub_model_id or Path(self.output_dir).resolve().name

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as `from_dict` takes them, without the token."""
        return {**dataclasses.asdict(self), "hub_token": None}


@functools.cache
def field_types() -> dict[str, Any]:
    """Of all fields: they are read from text, which takes its time."""
    return get_type_hints(ConsistencyConfig)
