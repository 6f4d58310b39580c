"""Images of students and teachers, each from its own seed, in eight bits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from cm_diffusers.evaluation.digests import model_digest
from cm_diffusers.guidance import GuidedDenoiser, without_class
from cm_diffusers.network_config import class_labels, height_and_width
from cm_diffusers.noise_levels import karras_grid
from cm_diffusers.pipelines import ConsistencyPipeline
from cm_diffusers.solvers import SOLVERS, integrate
from cm_diffusers.training.randomness import generators, labels_in_turn
from cm_diffusers.training.teacher import Teacher


@dataclass(frozen=True)
class Sampler:
    """Draws the images of given seeds.

    Args:
        model (`str`): whose they are.
        description (`str`): how they are drawn.
        nfe (`int`): network evaluations per image.
        draw (`Callable`): from a list of seeds to images of shape `(batch, channels, height, width)` in uint8. An
            image depends on its seed alone.
        network (`nn.Module`, *optional*): that draws them.
        config (`Mapping`, *optional*): of its scheduler.
        prompts (`tuple[str, ...]`): what the images are made of, that of seed i of prompt i mod n; empty without text.
    """

    model: str
    description: str
    nfe: int
    draw: Callable[[Sequence[int]], Tensor]
    network: nn.Module | None = None
    config: Mapping[str, Any] | None = None
    prompts: tuple[str, ...] = ()

    @cached_property
    def digest(self) -> str:
        """Of the weights and the scheduler: what tells this model from another of the same name. Empty if unknown."""
        return "" if self.network is None else model_digest(self.network, self.config or {})


def student_sampler(
    pipeline: ConsistencyPipeline, nfe: int, guidance_scale: float = 1.0, class_label: int | None = None,
    name: str = "student",
) -> Sampler:  # fmt: skip
    """Multistep consistency sampling in `nfe` steps, at the noise levels stored with the student if there are any.

    Args:
        pipeline ([`ConsistencyPipeline`]): on its device.
        nfe (`int`): steps.
        guidance_scale (`float`): of a class-conditional student; doubles the evaluations where it is not 1.
        class_label (`int`, *optional*): the class of all images; all classes in turn when `None`.

    Raises:
        `ValueError`: for an `nfe` that the student's grid does not have.
    """
    pipeline.scheduler.set_timesteps(nfe)

    def draw(seeds: Sequence[int]) -> Tensor:
        labels = labels_in_turn(pipeline.classes, seeds, class_label)
        images = pipeline(
            batch_size=len(seeds), class_labels=labels, num_inference_steps=nfe, guidance_scale=guidance_scale,
            generator=generators(seeds), output_type="pt",
        ).images  # fmt: skip
        return eight_bits(images, (0.0, 1.0))

    guided = guidance_scale != 1
    description = "multistep consistency" + _extras(guidance_scale, class_label)
    return Sampler(name, description, nfe * (1 + guided), draw, pipeline.unet, pipeline.scheduler.config)


def teacher_sampler(
    teacher: Teacher, nfe: int, solver: str = "heun", sigma_min: float | None = None, sigma_max: float | None = None,
    guidance_scale: float = 1.0, null_class_label: int | None = None, class_label: int | None = None,
    name: str = "teacher",
) -> Sampler:  # fmt: skip
    """The probability-flow ODE of a teacher on a Karras grid (Karras et al. 2022, algorithm 1), deterministic.

    Args:
        teacher ([`~cm_diffusers.training.teacher.Teacher`]): on its device.
        nfe (`int`): evaluations per image; odd for `"heun"`, whose steps take two but for the last.
        solver (`str`): `"heun"`, or `"euler"`, which is DDIM.
        sigma_min, sigma_max (`float`, *optional*): the grid's ends; by default as far as the teacher goes, but no
            further than 0.002 and 80.
        guidance_scale (`float`): classifier-free guidance, which needs `null_class_label`.
        class_label (`int`, *optional*): the class of all images; all classes in turn when `None`.

    Raises:
        `ValueError`: for another solver, an `nfe` that it cannot have, or a teacher that makes images of text.
    """
    if teacher.text is not None:
        raise ValueError(f"The teacher {teacher.name} makes images of text, and needs prompts for it.")
    if solver not in SOLVERS:
        raise ValueError(f"`solver` must be one of {', '.join(SOLVERS)}, got {solver!r}.")
    if nfe < 1 or (solver == "heun" and nfe % 2 == 0):
        raise ValueError(f"Heun's method takes an odd number of evaluations of at least 1, got {nfe}.")
    low, high = teacher.preconditioning.sigma_range
    low, high = sigma_min or max(low, 0.002), sigma_max or min(high, 80.0)
    steps = (nfe + 1) // 2 if solver == "heun" else nfe
    sigmas = karras_grid(steps, low, high).flip(0) if steps > 1 else torch.tensor([high])
    config: Any = teacher.unet.config
    size = height_and_width(config.sample_size)
    guided = guidance_scale != 1
    denoise: Any = teacher.denoiser
    if guided:
        if null_class_label is None:
            raise ValueError("`guidance_scale` needs `null_class_label`, the label that stands for 'no class'.")
        denoise = GuidedDenoiser(teacher.denoiser, guidance_scale, without_class(null_class_label))

    @torch.no_grad()
    def draw(seeds: Sequence[int]) -> Tensor:
        weight = next(teacher.unet.parameters())
        noise = torch.stack([torch.randn(config.in_channels, *size, generator=g) for g in generators(seeds)])
        sample = noise.to(weight.device) * sigmas[0].to(noise)
        labels = labels_in_turn(class_labels(config, null_class_label), seeds, class_label)
        conditioning = {} if labels is None else {"class_labels": torch.tensor(labels, device=weight.device)}
        return eight_bits(
            integrate(denoise, sample, sigmas, SOLVERS[solver], **conditioning), teacher.preconditioning.image_range
        )

    method = {"heun": "Heun", "euler": "DDIM"}[solver]
    description = f"{method}, sigma {low:.3g} to {high:.3g}" + _extras(guidance_scale, class_label)
    return Sampler(name, description, nfe * (1 + guided), draw, teacher.unet, teacher.scheduler.config)


def _extras(guidance_scale: float, class_label: int | None) -> str:
    """What a sampler's description says only where it is out of the ordinary."""
    guidance = f", guidance {guidance_scale:g}" if guidance_scale != 1 else ""
    return guidance + (f", class {class_label}" if class_label is not None else "")


def eight_bits(images: Tensor, value_range: tuple[float, float]) -> Tensor:
    """Images as they are saved: clipped and rounded to uint8.

    Raises:
        `FloatingPointError`: if a value is not finite, as a diverged model's are.
    """
    if not images.isfinite().all():
        raise FloatingPointError("Images with values that are not finite cannot be measured: the model has diverged.")
    low, high = value_range
    return ((images.float() - low) / (high - low) * 255).clamp(0, 255).round().to(torch.uint8)
