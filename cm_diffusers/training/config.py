"""The configuration of a training run: one dataclass, whose methods are named choices of five parts."""

from __future__ import annotations

import dataclasses
import difflib
import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from cm_diffusers.training.methods import METHODS, NEEDED_BY_LEVELS


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

    method: Literal["cd", "ct", "ict", "ect", "ecd", "tcm", "sct", "scd", "meanflow"] = _option(
        "cd", "cd, ecd, scd: distil a teacher; ct, ict, ect, tcm, sct, meanflow: train on data"
    )

    # The teacher
    teacher: str | None = _option(None, "folder or Hub id of the teacher's pipeline")
    teacher_revision: str | None = _option(None, "branch, tag or commit of the teacher on the Hub")
    teacher_prediction_type: str | None = _option(
        None, "replaces the prediction type in the teacher's scheduler config"
    )
    teacher_check: bool = _option(True, "first test on real images that the teacher is read correctly")
    guidance_scale: float = _option(1.0, "classifier-free guidance of the teacher's steps; 1 is off")
    null_class_label: int | None = _option(None, "the label that stands for 'no class'")
    label_dropout: float = _option(
        0.0, "share of labels replaced by null_class_label, so that the student can be guided"
    )

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

    # The five choices
    levels: Literal["fixed", "progressive", "doubling", "mapping", "continuous"] | None = _option(
        None, "the lower level of a pair: the next of N(k) on a grid, mapped from the higher one, or its limit"
    )
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
    distance: Literal["l1", "l2", "lpips", "pseudo_huber"] | None = _option(None, "distance between two images")
    huber_c: float | None = _option(None, "constant of the pseudo-Huber distance; by default 0.00054 * sqrt(d)")
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
    dataset: str | None = _option(None, "Hub id, folder of images, parquet files, or a saved dataset")
    dataset_name: str | None = _option(None, "configuration of the dataset")
    data_files: list[str] | None = _option(
        None, "files or URLs of the dataset, with wildcards; with `dataset: webdataset`, its shards"
    )
    dataset_split: str = _option("train", "split of the dataset")
    streaming: bool = _option(False, "read the dataset as it comes, without downloading it first")
    image_column: str | None = _option(None, "column of images; found by itself when there is one")
    label_column: str | None = _option(None, "column of class labels, for class-conditional students")
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
    channels_last: bool = _option(False, "memory format of networks and images; faster convolutions on most GPUs")
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
    sample_nfes: list[int] = _option([1, 2], "numbers of steps to sample with")
    eval_steps: int = _option(0, "steps between evaluations against the training images; 0: none")
    eval_features: str = _option("inception", "feature network: inception, a classifier's folder, or module:function")
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
            value = coerce(spec.name, getattr(self, spec.name))
            setattr(self, spec.name, value)
        self._check_numbers()

    def resolve(self) -> ConsistencyConfig:
        """The config with the method's choices filled in, and checked against each other."""
        choices = {name: value for name, value in METHODS[self.method].items() if getattr(self, name) is None}
        config = dataclasses.replace(self, **choices)
        while overridden := choices.keys() & config._without_effect().keys():  # of the method, by something else
            for name in overridden:
                setattr(config, name, None)
        if config.level_distribution == "lognormal":  # by default Song & Dhariwal's
            config.p_mean = -1.1 if config.p_mean is None else config.p_mean
            config.p_std = 2.0 if config.p_std is None else config.p_std
        if config.flow_map and config.boundary is None:
            config.boundary = "euler"
        config._check_effect()
        config._check_levels()
        if config.source == "teacher" and config.solver is None and config.levels != "continuous":
            raise ValueError("`source='teacher'` needs a `solver`.")
        if config.real_data and config.source != "teacher":
            raise ValueError("`real_data` takes the place of a part of the teacher's: it needs `source='teacher'`.")
        if config.guidance_scale != 1 and config.source != "teacher":
            raise ValueError("`guidance_scale` acts on the teacher's steps: it needs `source='teacher'`.")
        if config.guidance_scale != 1 and config.null_class_label is None:
            raise ValueError("`guidance_scale` needs `null_class_label`, the label that stands for 'no class'.")
        if config.label_dropout and config.null_class_label is None:
            raise ValueError("`label_dropout` needs `null_class_label`, the label that stands for 'no class'.")
        return config

    def _without_effect(self) -> dict[str, str]:
        """What is set without doing anything, and what it would need."""

        def needs(name: str, value: str) -> tuple[bool, str]:
            return getattr(self, name) == value, f"`{name}={value!r}`"

        growing, grows = self.levels in ("progressive", "doubling"), "`levels='progressive'` or `'doubling'`"
        rules = {
            "num_levels": needs("levels", "fixed"),
            "s0": (growing or self.mu_schedule == "progressive", grows),
            "s1": (growing, grows),
            **dict.fromkeys(("stages", "mapping_base", "truncation"), needs("levels", "mapping")),
            **dict.fromkeys(("flow_map", "tangent_warmup_steps", "derivative"), needs("levels", "continuous")),
            **dict.fromkeys(("mu", "mu_schedule"), needs("target", "ema")),
            "huber_c": needs("distance", "pseudo_huber"),
            "solver": needs("source", "teacher"),
            **dict.fromkeys(("p_mean", "p_std"), needs("level_distribution", "lognormal")),
            "first_stage_steps": (self.truncation is not None, "`truncation`, with which the second stage begins"),
        }
        return {name: need for name, (works, need) in rules.items() if not works and getattr(self, name) is not None}

    def _check_effect(self) -> None:
        """See that everything that is set does something."""
        for name, needed in self._without_effect().items():
            raise ValueError(f"`{name}` needs {needed}.")
        if self.target == "ema" and self.mu is None:
            raise ValueError("`target='ema'` needs `mu`.")
        if self.method == "tcm" and self.truncation is None:
            raise ValueError("`method='tcm'` needs `levels='mapping'`, whose truncation it is.")
        if self.first_stage_steps is not None and self.first_stage_steps >= self.max_train_steps:
            raise ValueError("`first_stage_steps` must leave steps for the second stage.")
        if self.flow_map and self.boundary not in (None, "euler"):
            raise ValueError(f"`flow_map` has the boundary 'euler', not {self.boundary!r}.")
        if self.flow_map and self.tangent_warmup_steps:
            raise ValueError("`tangent_warmup_steps` has no meaning for a flow map: leave it out.")

    def _check_levels(self) -> None:
        """See that what the levels need is there, and that it has a meaning for them."""
        levels = self.levels or "fixed"
        for name in NEEDED_BY_LEVELS[levels]:
            if getattr(self, name) is None:
                raise ValueError(f"`levels={levels!r}` needs `{name}`.")
        if self.mu_schedule == "progressive" and (self.s0 is None or levels in ("mapping", "continuous")):
            raise ValueError("`mu_schedule='progressive'` follows the number of levels on a grid, and needs `s0`.")
        if levels == "continuous":
            self._require("distance", lambda value: value == "l2", "l2, as continuous levels compare derivatives")
            self._require("weighting", lambda value: value != "inverse_gap", "uniform or adaptive: there is no gap")
            self._require("target", lambda value: value == "student", "the student for continuous levels")
            self._require("solver", lambda value: False, "none for continuous levels, which take no step")
        if levels in ("mapping", "continuous"):
            self._require("level_distribution", lambda value: value == "lognormal", "lognormal where there is no grid")

    def _check_numbers(self) -> None:
        positive = (
            "max_train_steps batch_size gradient_accumulation_steps learning_rate conversion_learning_rate sigma_min "
            "sigma_max huber_c resolution p_std ema_half_life ema_rampup logging_steps num_samples checkpoint_limit "
            "s0 max_bad_steps distributed_timeout stages truncation first_stage_steps"
        )
        for name in positive.split():
            self._require(name, lambda value: value > 0, "positive")
        not_negative = (
            "conversion_steps lr_warmup_steps num_workers checkpoint_steps sample_steps weight_decay eval_steps "
            "tangent_warmup_steps adversarial_weight"
        )
        for name in not_negative.split():
            self._require(name, lambda value: value >= 0, "at least 0")
        self._require("num_levels", lambda value: value >= 2, "at least 2: a pair needs two noise levels")
        self._require("mapping_base", lambda value: value > 1, "above 1")
        self._require("s1", lambda value: value >= (self.s0 or 1), "at least `s0`")
        self._require("real_data", lambda value: 0 <= value <= 1, "in [0, 1]")
        self._require("label_dropout", lambda value: 0 <= value < 1, "in [0, 1)")
        self._require("mu", lambda value: 0 <= value < 1, "in [0, 1)")
        self._require("max_grad_norm", lambda value: value > 0, "positive")
        self._require("adam_betas", lambda betas: len(betas) == 2 and all(0 <= b < 1 for b in betas), "two in [0, 1)")
        self._require("sample_nfes", lambda nfes: all(n >= 1 for n in nfes), "positive")
        for name in ("eval_num_images", "eval_num_reference"):
            self._require(name, lambda value: value >= 2, "at least 2")
        self._require("eval_nfes", lambda nfes: nfes and all(n >= 1 for n in nfes), "positive, and one at least")
        if self.sigma_min is not None and self.sigma_max is not None and self.sigma_min >= self.sigma_max:
            raise ValueError(f"Need sigma_min < sigma_max, got {self.sigma_min} and {self.sigma_max}.")

    def _require(self, name: str, condition: Any, meaning: str) -> None:
        value = getattr(self, name)
        if value is not None and not condition(value):
            raise ValueError(f"`{name}` must be {meaning}, got {value}.")

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

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as `from_dict` takes them, without the token."""
        return {**dataclasses.asdict(self), "hub_token": None}


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The keys and values of a YAML config file.

    Raises:
        `ValueError`: if the file is missing, is not YAML or holds something other than keys and values.
    """
    import yaml

    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ValueError(f"Cannot read the config file {path}: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"The config file {path} must hold `key: value` lines, got {type(values).__name__}.")
    return values


def unknown_key(key: str, names: list[str]) -> str:
    """What to say of a key that does not exist."""
    near = difflib.get_close_matches(key, names, n=1, cutoff=0.5)
    return f"Unknown option {key!r}." + (f" Did you mean {near[0]!r}?" if near else f" Options: {', '.join(names)}.")


def coerce(name: str, value: Any) -> Any:
    """`value` as the type of the config's field `name` (YAML reads `1e-4` as text, and integers where floats go).

    Raises:
        `ValueError`: if it is not of that type, or not one of the choices.
    """
    hint = field_types()[name]
    kinds = [kind for kind in get_args(hint) if kind is not type(None)] if _is_optional(hint) else [hint]
    if value is None:
        if _is_optional(hint):
            return None
        raise ValueError(f"`{name}` must not be empty.")
    kind = kinds[0]
    if get_origin(kind) is Literal:
        if value is False and "no" in get_args(kind):  # YAML's `no`
            value = "no"
        if value not in get_args(kind):
            raise ValueError(f"`{name}` must be one of {', '.join(map(str, get_args(kind)))}, got {value!r}.")
        return value
    try:
        return _convert(kind, value)
    except (TypeError, ValueError) as error:
        expected = getattr(kind, "__name__", str(kind))
        raise ValueError(f"`{name}` must be of type {expected}, got {value!r}.") from error


@functools.cache
def field_types() -> dict[str, Any]:
    """Of all fields: they are read from text, which takes its time."""
    return get_type_hints(ConsistencyConfig)


def _is_optional(hint: Any) -> bool:
    return type(None) in get_args(hint)


def _convert(kind: Any, value: Any) -> Any:
    if get_origin(kind) is list:
        return [_convert(get_args(kind)[0], item) for item in (value if isinstance(value, list | tuple) else [value])]
    if get_origin(kind) is dict:
        return {str(key): _convert(get_args(kind)[1], item) for key, item in dict(value).items()}
    if kind is bool:
        words = {"true": True, "yes": True, "false": False, "no": False}
        if isinstance(value, bool):
            return value
        if str(value).lower() in words:
            return words[str(value).lower()]
        raise ValueError(value)
    if isinstance(value, bool) or isinstance(value, list | dict):
        raise TypeError(value)
    if kind is int and float(value) != int(float(value)):
        raise ValueError(value)
    return int(float(value)) if kind is int else kind(value)
