"""What is refused in a config: values out of range, and choices that do not go together or do nothing."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

from cm_diffusers.training.methods import NEEDED_BY_LEVELS

if TYPE_CHECKING:
    from cm_diffusers.training.config import ConsistencyConfig


LAST_STAGE = 20  # of mapped levels that halve their gap: then float32 leaves it four digits of two


def check_choices(config: ConsistencyConfig, from_text: bool) -> None:
    """Check a resolved config.

    Args:
        from_text (`bool`): whether images are made from text.

    Raises:
        `ValueError`: for choices that do not go together.
    """
    _check_effect(config)
    _check_levels(config)
    if config.source == "teacher" and config.solver is None and config.levels != "continuous":
        raise ValueError("`source='teacher'` needs a `solver`.")
    if config.real_data and config.source != "teacher":
        raise ValueError("`real_data` takes the place of a part of the teacher's: it needs `source='teacher'`.")
    if from_text:
        _check_text(config)
    else:
        _check_classes(config)


def _check_text(config: ConsistencyConfig) -> None:
    """See that what is set goes with text."""
    guided = config.w_min is not None or (config.guidance_scale or 1) != 1
    if guided and config.source != "teacher":
        raise ValueError("Guidance (`guidance_scale`, `w_min`) acts on the teacher's steps: `source='teacher'`.")
    if config.w_min is not None:
        if config.guidance_scale is not None:
            raise ValueError("`guidance_scale` is one for all, and `w_min` and `w_max` draw it: set either.")
        if config.lora_rank:
            raise ValueError("`w_min`: adapters cannot be told the guidance, which is a layer more.")
        if config.w_max is None or not config.w_min <= config.w_max:
            raise ValueError(f"Need w_min <= w_max, got {config.w_min} and {config.w_max}.")
    if config.distance == "lpips":
        raise ValueError("`distance='lpips'` compares pictures, and the student's are latents.")
    if config.label_dropout or config.label_column or config.null_class_label is not None:
        raise ValueError("`label_column`, `label_dropout` and `null_class_label` need a class-conditional network.")
    if config.flow_map or config.adversarial_weight:
        raise ValueError("`flow_map` and `adversarial_weight` are for networks without text.")
    if config.lora_rank and (config.levels == "continuous" or config.conversion_steps):
        raise ValueError(
            "`lora_rank`: adapters leave the network what it predicts and its time as they are, which rules out "
            "`conversion_steps` and continuous levels."
        )


def _check_classes(config: ConsistencyConfig) -> None:
    """See that what is set goes with a network that is told classes, or nothing."""
    of_text = (
        "w_min w_max caption_dropout caption_column lora_rank lora_alpha lora_targets dora sample_prompts eval_clip"
    )
    defaults = {spec.name: spec.default for spec in dataclasses.fields(config)}
    for name in of_text.split():
        if getattr(config, name) != defaults[name]:
            raise ValueError(f"`{name}` needs a text-to-image teacher.")
    if config.guidance_scale != 1 and config.source != "teacher":
        raise ValueError("`guidance_scale` acts on the teacher's steps: it needs `source='teacher'`.")
    if config.guidance_scale != 1 and config.null_class_label is None:
        raise ValueError("`guidance_scale` needs `null_class_label`, the label that stands for 'no class'.")
    if config.label_dropout and config.null_class_label is None:
        raise ValueError("`label_dropout` needs `null_class_label`, the label that stands for 'no class'.")


def without_effect(config: ConsistencyConfig) -> dict[str, str]:
    """What is set without doing anything, and what it would need."""

    def needs(name: str, value: str) -> tuple[bool, str]:
        return getattr(config, name) == value, f"`{name}={value!r}`"

    growing, grows = config.levels in ("progressive", "doubling"), "`levels='progressive'` or `'doubling'`"
    rules = {
        "num_levels": needs("levels", "fixed"),
        "s0": (growing or config.mu_schedule == "progressive", grows),
        "s1": (growing, grows),
        **dict.fromkeys(("stages", "mapping_base", "truncation"), needs("levels", "mapping")),
        **dict.fromkeys(("flow_map", "tangent_warmup_steps", "derivative"), needs("levels", "continuous")),
        **dict.fromkeys(("mu", "mu_schedule"), needs("target", "ema")),
        "skip_interval": needs("levels", "skipping"),
        "huber_c": (config.distance in ("pseudo_huber", "huber"), "`distance='pseudo_huber'` or `'huber'`"),
        "solver": (
            config.source == "teacher" and config.levels != "continuous",
            "`source='teacher'`, and levels that are not continuous, which take no step",
        ),
        **dict.fromkeys(("p_mean", "p_std"), needs("level_distribution", "lognormal")),
        **dict.fromkeys(("lora_alpha", "lora_targets"), (config.lora_rank is not None, "`lora_rank`")),
        "first_stage_steps": (config.truncation is not None, "`truncation`, with which the second stage begins"),
    }
    return {name: need for name, (works, need) in rules.items() if not works and getattr(config, name) is not None}


def _check_effect(config: ConsistencyConfig) -> None:
    """See that everything that is set does something."""
    for name, needed in without_effect(config).items():
        raise ValueError(f"`{name}` needs {needed}.")
    if config.dora and config.lora_rank is None:
        raise ValueError("`dora` needs `lora_rank`.")
    if config.distance == "huber" and config.huber_c is None:
        raise ValueError("`distance='huber'` needs `huber_c`.")
    if config.target == "ema" and config.mu is None:
        raise ValueError("`target='ema'` needs `mu`.")
    if config.method == "tcm" and config.truncation is None:
        raise ValueError("`method='tcm'` needs `levels='mapping'`, whose truncation it is.")
    if config.first_stage_steps is not None and config.first_stage_steps >= config.max_train_steps:
        raise ValueError("`first_stage_steps` must leave steps for the second stage.")
    if config.flow_map and config.boundary not in (None, "euler"):
        raise ValueError(f"`flow_map` has the boundary 'euler', not {config.boundary!r}.")
    if config.flow_map and config.tangent_warmup_steps:
        raise ValueError("`tangent_warmup_steps` has no meaning for a flow map: leave it out.")


def _check_levels(config: ConsistencyConfig) -> None:
    """See that what the levels need is there, and that it has a meaning for them."""
    levels = config.levels or "fixed"
    for name in NEEDED_BY_LEVELS[levels]:
        if getattr(config, name) is None:
            raise ValueError(f"`levels={levels!r}` needs `{name}`.")
    if config.mu_schedule == "progressive" and (config.s0 is None or levels in ("mapping", "continuous", "skipping")):
        raise ValueError("`mu_schedule='progressive'` follows the number of levels on a grid, and needs `s0`.")
    if levels == "skipping" and config.boundary != "lcm":
        raise ValueError(f"`levels='skipping'` has the boundary 'lcm', not {config.boundary!r}.")
    if levels == "skipping":
        _require(config, "level_distribution", lambda value: value == "uniform", "uniform over timesteps")
    if levels == "progressive":
        _require(config, "s0", lambda value: value >= 2, "at least 2: a pair needs two noise levels")
    if levels == "mapping" and (config.stages or 1) * math.log2(config.mapping_base or 2) > LAST_STAGE:
        raise ValueError(
            f"`mapping_base` to the power of `stages` must be at most 2 to the power of {LAST_STAGE}, got "
            f"{config.mapping_base:g} and {config.stages}: in float32, pairs so near are of one level."
        )
    if levels == "continuous":
        _require(config, "distance", lambda value: value == "l2", "l2, as continuous levels compare derivatives")
        _require(config, "weighting", lambda value: value != "inverse_gap", "uniform or adaptive: there is no gap")
        _require(config, "target", lambda value: value == "student", "the student for continuous levels")
    if levels in ("mapping", "continuous"):
        _require(config, "level_distribution", lambda value: value == "lognormal", "lognormal where there is no grid")


def check_numbers(config: ConsistencyConfig) -> None:
    positive = (
        "max_train_steps batch_size gradient_accumulation_steps learning_rate conversion_learning_rate sigma_min "
        "sigma_max huber_c resolution p_std ema_half_life ema_rampup logging_steps num_samples checkpoint_limit "
        "s0 max_bad_steps distributed_timeout stages truncation first_stage_steps skip_interval lora_rank "
        "lora_alpha"
    )
    for name in positive.split():
        _require(config, name, lambda value: value > 0, "positive")
    not_negative = (
        "conversion_steps lr_warmup_steps num_workers checkpoint_steps sample_steps weight_decay eval_steps "
        "tangent_warmup_steps adversarial_weight w_min"
    )
    for name in not_negative.split():
        _require(config, name, lambda value: value >= 0, "at least 0")
    _require(config, "num_levels", lambda value: value >= 2, "at least 2: a pair needs two noise levels")
    _require(config, "mapping_base", lambda value: value > 1, "above 1")
    _require(config, "s1", lambda value: value >= (config.s0 or 1), "at least `s0`")
    _require(config, "real_data", lambda value: 0 <= value <= 1, "in [0, 1]")
    for name in ("label_dropout", "caption_dropout"):
        _require(config, name, lambda value: 0 <= value < 1, "in [0, 1)")
    _require(config, "mu", lambda value: 0 <= value < 1, "in [0, 1)")
    _require(config, "max_grad_norm", lambda value: value > 0, "positive")
    _require(config, "adam_betas", lambda betas: len(betas) == 2 and all(0 <= b < 1 for b in betas), "two in [0, 1)")
    _require(config, "sample_nfes", lambda nfes: all(n >= 1 for n in nfes), "positive")
    for name in ("eval_num_images", "eval_num_reference"):
        _require(config, name, lambda value: value >= 2, "at least 2")
    _require(config, "eval_nfes", lambda nfes: nfes and all(n >= 1 for n in nfes), "positive, and one at least")
    if config.sigma_min is not None and config.sigma_max is not None and config.sigma_min >= config.sigma_max:
        raise ValueError(f"Need sigma_min < sigma_max, got {config.sigma_min} and {config.sigma_max}.")


def _require(config: ConsistencyConfig, name: str, condition: Any, meaning: str) -> None:
    value = getattr(config, name)
    if value is not None and not condition(value):
        raise ValueError(f"`{name}` must be {meaning}, got {value}.")
