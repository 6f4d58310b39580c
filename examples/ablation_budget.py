"""What a run of an ablation costs, in forward passes of one image."""

from __future__ import annotations

from cm_diffusers import ConsistencyConfig
from cm_diffusers.training.phases import first_stage_steps

GRADIENT_PASSES = 3  # a pass forward and its gradient, which costs two more


def step_passes(config: ConsistencyConfig, step: int = 0) -> int:
    """Forward passes of one image that a step of a resolved config's method is worth.

    - 3 for the student with its gradient;
    - 1 for the target without; 2 for the derivative that takes its place in continuous time, and in a second stage,
      where the first one's student answers, too;
    - with `source: teacher`, 1 for an Euler step of the teacher and 2 for one of Heun's, both twice if it is guided;
    - with an adversarial term, 1 for the teacher's features of real images, and 2 for those of the student's, with
      their gradient by the images.

    Distances and optimiser are not counted; LPIPS, whose VGG is larger than small students, shows in the seconds.

    Args:
        step (`int`): counted from the method's first.
    """
    target = 2 if config.levels == "continuous" or step >= first_stage_steps(config) else 1
    teacher = 0
    if config.source == "teacher":
        teacher = (2 if config.solver == "heun" else 1) * teacher_passes(config)
    return GRADIENT_PASSES + target + teacher + (3 if config.adversarial_weight else 0)


def teacher_passes(config: ConsistencyConfig) -> int:
    """Forward passes that asking the teacher once is worth."""
    return 2 if config.guidance_scale != 1 else 1


def passes_text(config: ConsistencyConfig) -> str:
    """The passes of a step, as the table has them."""
    first = first_stage_steps(config)
    later = f", then {step_passes(config, first)}" if first < config.max_train_steps else ""
    return f"{step_passes(config)}{later}"


def total_passes(config: ConsistencyConfig, converting: int, steps: int) -> int:
    """Forward passes of one image that so many steps are worth, after `converting` that ask the teacher once each.

    Args:
        steps (`int`): up to `config.max_train_steps`.
    """
    images = config.batch_size * config.gradient_accumulation_steps
    first = min(steps, first_stage_steps(config))
    method = first * step_passes(config) + (steps - first) * step_passes(config, first)
    return images * (converting * (GRADIENT_PASSES + teacher_passes(config)) + method)
