"""What a run does in which order: a conversion if the teacher needs one, then the method, in one stage or two."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from cm_diffusers.guidance import GuidedDenoiser, without_class
from cm_diffusers.noise_levels import DiscreteLevels, Levels
from cm_diffusers.preconditioning import Denoiser
from cm_diffusers.schedulers import ConsistencyScheduler
from cm_diffusers.solvers import SOLVERS, Denoise
from cm_diffusers.training.config import ConsistencyConfig
from cm_diffusers.training.distances import build_distance
from cm_diffusers.training.objectives import Objective
from cm_diffusers.training.objectives.adversarial import Adversarial
from cm_diffusers.training.objectives.conversion import ConversionObjective
from cm_diffusers.training.objectives.pairs import (
    WEIGHTINGS,
    FromTeacher,
    PairObjective,
    PartlyFromData,
    Piecewise,
    Source,
    from_data,
)
from cm_diffusers.training.objectives.tangents import (
    DERIVATIVES,
    ConsistencyJumps,
    FlowMapJumps,
    NormalizedTangent,
    PowerNormalizedTangent,
    TangentObjective,
    WarmUp,
)
from cm_diffusers.training.objectives.weights import AdaptivelyWeighted
from cm_diffusers.training.schedules import Rate, make_levels, make_sigmas
from cm_diffusers.training.student import needs_conversion
from cm_diffusers.training.teacher import Teacher

logger = logging.getLogger(__name__)

CONVERSION = "conversion"


@dataclass
class Phase:
    """A stretch of training with one objective and its own learning rates.

    Args:
        name (`str`): [`CONVERSION`], or the method's.
        objective ([`~cm_diffusers.training.objectives.Objective`]): what is minimised.
        start, steps (`int`): its first step in the run, and how many it has.
        learning_rate_at ([`~cm_diffusers.training.schedules.Rate`]): of a step, counted from the phase's beginning.
        describe (`Callable[[int], dict[str, float]]`): where its curriculum stands, for the log.
    """

    name: str
    objective: Objective
    start: int
    steps: int
    learning_rate_at: Rate
    describe: Callable[[int], dict[str, float]] = lambda step: {}

    @property
    def is_method(self) -> bool:
        """Whether a consistency function is trained, and not only prepared for."""
        return self.name != CONVERSION


@dataclass(frozen=True)
class Networks:
    """What the objectives of a run are made of.

    Args:
        student (`nn.Module`): the network that is trained, as accelerate wraps it.
        target (`nn.Module`, *optional*): the average that answers at the lower level; the student itself when `None`.
        first_stage (`nn.Module`, *optional*): the frozen student of a first stage.
        log_loss (`nn.Module`, *optional*): the estimate behind a learned weight.
        discriminator (`nn.Module`, *optional*): tells the student's images from real ones.
        forward_mode (`bool`): whether nothing stands in the way of forward-mode differentiation of the student.
    """

    student: Any
    target: nn.Module | None = None
    first_stage: nn.Module | None = None
    log_loss: nn.Module | None = None
    discriminator: nn.Module | None = None
    forward_mode: bool = True

    @property
    def plain(self) -> Any:
        """The student without the wrapper of several processes, which synchronises for passes without gradient."""
        return getattr(self.student, "module", self.student)


def make_phases(
    config: ConsistencyConfig,
    teacher: Teacher | None,
    scheduler: ConsistencyScheduler,
    networks: Networks,
    device: torch.device,
) -> list[Phase]:
    """The phases of a resolved config with learning rates; the method itself is the last, or the last two."""
    phases: list[Phase] = []

    def add(name: str, objective: Objective, steps: int, rate: Rate, **rest: Any) -> None:
        start = phases[-1].start + phases[-1].steps if phases else 0
        phases.append(Phase(name, objective, start, steps, rate, **rest))

    steps = conversion_steps(config, teacher, scheduler)
    if config.conversion_steps and not steps:
        logger.warning("`conversion_steps` has no effect: there is nothing in the student to be converted.")
    if steps and teacher is not None:
        assert config.conversion_learning_rate is not None
        now = scheduler.config
        own = Denoiser(networks.student, scheduler.preconditioning)
        # A guided teacher is guided now, too: what it is distilled from is what the student begins with.
        conversion = ConversionObjective(
            own,
            _teacher_denoiser(config, teacher) or teacher.denoiser,
            now.sigma_min,
            now.sigma_max,
            now.rho,
            flow_map=now.flow_map,
        )
        add(CONVERSION, conversion, steps, Rate(config.conversion_learning_rate, steps, "cosine", steps // 20))

    def with_terms(objective: Objective) -> Objective:
        if networks.log_loss is not None:
            objective = AdaptivelyWeighted(objective, networks.log_loss)
        if networks.discriminator is not None and teacher is not None:
            ends = (scheduler.config.sigma_min, scheduler.config.sigma_max)
            objective = Adversarial(objective, networks.discriminator, teacher, config.adversarial_weight, *ends)
        return objective

    assert config.learning_rate is not None
    rate = Rate(config.learning_rate, config.max_train_steps, config.lr_schedule, config.lr_warmup_steps)
    if config.levels == "continuous":
        tangents = _tangent_objective(config, teacher, scheduler, networks)
        add(config.method, with_terms(tangents), config.max_train_steps, rate)
        return phases
    taken = 0
    for levels, steps in stages(config, scheduler):
        objective = _pair_objective(config, teacher, scheduler, networks, levels, device, is_truncated=taken > 0)
        add(config.method, with_terms(objective), steps, rate.after(taken), describe=levels.describe)
        taken += steps
    return phases


def asks_denoiser(config: ConsistencyConfig, teacher: Teacher, phases: list[Phase], step: int) -> bool:
    """Whether, from a step on, a student learns what a denoiser says: by its method, or its conversion before."""
    converts = not phases[0].is_method and step < phases[0].steps
    return not teacher.is_consistency_model and (config.source == "teacher" or converts)


def stages(config: ConsistencyConfig, scheduler: ConsistencyScheduler) -> list[tuple[Levels, int]]:
    """The levels of a method's stages, and their steps."""
    total, first = config.max_train_steps, first_stage_steps(config)
    if config.levels == "skipping":
        ends_with_sigma_min = [scheduler.config.sigma_min, *scheduler.grid[::-1]]
        return [(DiscreteLevels(torch.tensor(ends_with_sigma_min, dtype=torch.float32)), total)]
    now = (scheduler.config.sigma_min, scheduler.config.sigma_max, scheduler.config.rho)
    found = [(make_levels(config, first, *now), first)]
    if first < total:
        found.append((make_levels(config, total - first, *now, is_truncated=True), total - first))
    return found


def first_stage_steps(config: ConsistencyConfig) -> int:
    """Steps of a method before its truncation; all of them where there is none."""
    if config.truncation is None:
        return config.max_train_steps
    return min(config.first_stage_steps or max(1, config.max_train_steps // 2), config.max_train_steps)


def _pair_objective(
    config: ConsistencyConfig, teacher: Teacher | None, scheduler: ConsistencyScheduler, networks: Networks,
    levels: Levels, device: torch.device, is_truncated: bool,
) -> PairObjective:  # fmt: skip
    f = Denoiser(networks.student, scheduler.boundary)
    target: Denoise = Denoiser(networks.plain if networks.target is None else networks.target, scheduler.boundary)
    # A learned weight takes the place of one that is given.
    weighting = WEIGHTINGS.get(config.weighting or "uniform", WEIGHTINGS["uniform"])
    if is_truncated and networks.first_stage is not None:
        below = Denoiser(networks.first_stage, scheduler.boundary)
        target = Piecewise(target, below, config.truncation or 1.0)
    distance = build_distance(config.distance or "l2", config.huber_c, tuple(scheduler.config.image_range), device)
    denoise = _teacher_denoiser(config, teacher)
    source: Source = from_data
    if denoise is not None:
        source = FromTeacher(denoise, SOLVERS[config.solver or "heun"])
    if config.real_data:
        source = PartlyFromData(source, config.real_data)
    return PairObjective(f, target, levels, source, distance, weighting)


def _tangent_objective(
    config: ConsistencyConfig, teacher: Teacher | None, scheduler: ConsistencyScheduler, networks: Networks
) -> TangentObjective:
    if config.derivative == "forward" and not networks.forward_mode:
        raise ValueError("`derivative='forward'` goes neither with `compile` nor with weights in parts: leave it out.")
    low, high, family = scheduler.config.sigma_min, scheduler.config.sigma_max, scheduler.preconditioning
    sigmas = make_sigmas(config, low, high)
    jumps = FlowMapJumps(family, low, sigmas) if config.flow_map else ConsistencyJumps(scheduler.boundary, sigmas)
    return TangentObjective(
        networks.student, networks.plain, family.denoising, jumps, _teacher_denoiser(config, teacher),
        DERIVATIVES[config.derivative or ("forward" if networks.forward_mode else "finite_difference")],
        PowerNormalizedTangent() if config.flow_map else NormalizedTangent(),
        WarmUp(tangent_warmup_steps(config)), config.real_data,
    )  # fmt: skip


def tangent_warmup_steps(config: ConsistencyConfig) -> int:
    """Steps until the network's own derivative counts fully."""
    if config.flow_map:
        return 0
    if config.tangent_warmup_steps is not None:
        return config.tangent_warmup_steps
    return min(config.max_train_steps // 10, 10_000)


def _teacher_denoiser(config: ConsistencyConfig, teacher: Teacher | None) -> Denoise | None:
    """D of the teacher, or `None` for training on data."""
    if config.source == "data":
        return None
    if teacher is None:
        raise ValueError("`source='teacher'` needs a `teacher`.")
    if config.guidance_scale == 1:
        return teacher.denoiser
    without = without_class(config.null_class_label or 0) if teacher.text is None else teacher.text.without_text
    return GuidedDenoiser(teacher.denoiser, config.guidance_scale or 1.0, without)


def conversion_steps(config: ConsistencyConfig, teacher: Teacher | None, scheduler: ConsistencyScheduler) -> int:
    """How long the student is converted before the method begins; 0 if it says and is told what its teacher does."""
    if teacher is None or not needs_conversion(teacher.scheduler, scheduler):
        return 0
    if config.conversion_steps is not None:
        return config.conversion_steps
    return max(1, min(config.max_train_steps // 10, 10_000))
