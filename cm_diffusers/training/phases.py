"""What a run does in which order: a conversion if the teacher needs one, then the method itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from cm_diffusers.noise_levels import Levels
from cm_diffusers.preconditioning import Denoiser, GuidedDenoiser
from cm_diffusers.schedulers import ConsistencyScheduler
from cm_diffusers.training.config import ConsistencyConfig
from cm_diffusers.training.distances import build_distance
from cm_diffusers.training.ema import EMA
from cm_diffusers.training.objectives import Objective
from cm_diffusers.training.objectives.conversion import ConversionObjective
from cm_diffusers.training.objectives.pairs import WEIGHTINGS, FromTeacher, PairObjective, Source, from_data
from cm_diffusers.training.schedules import learning_rate
from cm_diffusers.training.solvers import SOLVERS, Denoise
from cm_diffusers.training.student import needs_conversion
from cm_diffusers.training.teacher import Teacher


@dataclass
class Phase:
    """A stretch of training with one objective and its own learning rates."""

    name: str
    objective: Objective
    start: int
    steps: int
    learning_rate: float
    lr_schedule: str
    lr_warmup_steps: int

    def learning_rate_at(self, step: int) -> float:
        """The learning rate of a step, counted from the beginning of the phase."""
        return learning_rate(step, self.steps, self.learning_rate, self.lr_schedule, self.lr_warmup_steps)


def make_phases(
    config: ConsistencyConfig,
    teacher: Teacher | None,
    scheduler: ConsistencyScheduler,
    levels: Levels,
    student: Any,
    target_ema: EMA | None,
    device: torch.device,
) -> list[Phase]:
    """The phases of a resolved config; the method itself is the last.

    Args:
        student (`nn.Module`): the network that is trained, as accelerate wraps it.
        target_ema ([`~cm_diffusers.training.ema.EMA`], *optional*): the target's weights; the student's own if `None`.
    """
    if target_ema is not None:
        target_ema.network.train()  # the dropout of the student
    f = Denoiser(student, scheduler.boundary)
    # Not through the wrapper of several processes, which would synchronise for a pass without gradient.
    target_network = getattr(student, "module", student) if target_ema is None else target_ema.network
    f_target = Denoiser(target_network, scheduler.boundary)
    distance = build_distance(config.distance or "l2", config.huber_c, tuple(scheduler.config.image_range), device)
    weighting = WEIGHTINGS[config.weighting or "uniform"]
    method = PairObjective(f, f_target, levels, _source(config, teacher), distance, weighting)

    steps = conversion_steps(config, teacher, scheduler)
    rate, schedule, warmup = config.learning_rate, config.lr_schedule, config.lr_warmup_steps
    phases = [Phase(config.method, method, steps, config.max_train_steps, rate, schedule, warmup)]
    if steps and teacher is not None:
        own = Denoiser(student, scheduler.preconditioning)
        conversion = ConversionObjective(own, teacher.denoiser, levels.sigma_min, levels.sigma_max, levels.rho)
        rate = config.conversion_learning_rate
        phases.insert(0, Phase("conversion", conversion, 0, steps, rate, "cosine", steps // 20))
    return phases


def _source(config: ConsistencyConfig, teacher: Teacher | None) -> Source:
    if config.source == "data":
        return from_data
    if teacher is None:
        raise ValueError("`source='teacher'` needs a `teacher`.")
    denoise: Denoise = teacher.denoiser
    if config.guidance_scale != 1:
        denoise = GuidedDenoiser(teacher.denoiser, config.guidance_scale, config.null_class_label or 0)
    return FromTeacher(denoise, SOLVERS[config.solver or "heun"])


def conversion_steps(config: ConsistencyConfig, teacher: Teacher | None, scheduler: ConsistencyScheduler) -> int:
    """How long the student is converted before the method begins; 0 if it predicts what its teacher does."""
    if teacher is None or not needs_conversion(teacher.scheduler) or scheduler.config.family != "vp":
        return 0
    if config.conversion_steps is not None:
        return config.conversion_steps
    return max(1, min(config.max_train_steps // 10, 10_000))
