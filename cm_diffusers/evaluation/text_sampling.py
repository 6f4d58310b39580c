"""Images that students and teachers make of text, each from its own seed and prompt, in eight bits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from cm_diffusers.evaluation.sampling import Sampler, eight_bits
from cm_diffusers.pipelines.text import asks_twice, draw_prompts, prompts_in_turn, resolve_guidance
from cm_diffusers.training.randomness import generators


def text_student_sampler(
    pipeline: Any, nfe: int, prompts: Sequence[str], guidance_scale: float | None = None, name: str = "student"
) -> Sampler:
    """Multistep consistency sampling in `nfe` steps.

    Args:
        pipeline: of Stable Diffusion or SDXL under a [`ConsistencyScheduler`], on its device, as
            [`load_pipeline`] gives it.
        nfe (`int`): steps.
        prompts (`Sequence[str]`): the image of seed i is made of prompt i mod n.
        guidance_scale (`float`, *optional*): that the network is told, by default the middle of those that it was
            trained on, or 8.5; of a network that is told none, it doubles the evaluations, and is off (1) by default.

    Raises:
        `TypeError`, `ValueError`: for an `nfe` that the student's grid does not have, a guidance scale below 1, or
            prompts that are no list of texts.
    """
    pipeline.scheduler.set_timesteps(nfe)
    scale = resolve_guidance(pipeline, guidance_scale)
    return _sampler(pipeline, nfe, nfe, prompts, scale, name, "multistep consistency")


def text_teacher_sampler(
    pipeline: Any, nfe: int, prompts: Sequence[str], guidance_scale: float = 7.5, name: str = "teacher"
) -> Sampler:
    """A diffusion model as it is: the stock pipeline, under its own scheduler.

    Args:
        pipeline (`StableDiffusionPipeline` or `StableDiffusionXLPipeline`): on its device.
        nfe (`int`): steps of its scheduler. All evaluations are counted, of which some schedulers take more.
        prompts (`Sequence[str]`): the image of seed i is made of prompt i mod n.
        guidance_scale (`float`): classifier-free guidance, which doubles the evaluations; 1 is off.

    Raises:
        `TypeError`, `ValueError`: for a guidance scale below 1, or prompts that are no list of texts.
    """
    pipeline.scheduler.set_timesteps(nfe)
    evaluations = len(pipeline.scheduler.timesteps)
    method = type(pipeline.scheduler).__name__.removesuffix("Scheduler")
    return _sampler(pipeline, nfe, evaluations, prompts, resolve_guidance(pipeline, guidance_scale), name, method)


def _sampler(
    pipeline: Any, steps: int, evaluations: int, prompts: Sequence[str], guidance_scale: float, name: str, method: str
) -> Sampler:
    if isinstance(prompts, str) or not all(isinstance(text, str) for text in prompts):
        raise TypeError(f"`prompts` must be a list of texts, got {prompts!r:.80}.")
    if not prompts:
        raise ValueError("`prompts` must hold one text at least, got none.")

    def draw(seeds: Sequence[int]) -> Tensor:
        images = draw_prompts(pipeline, prompts_in_turn(prompts, seeds), steps, guidance_scale, generators(seeds))
        return eight_bits(images, (0.0, 1.0))

    description = method + (f", guidance {guidance_scale:g}" if guidance_scale != 1 else "")
    nfe = evaluations * (1 + asks_twice(pipeline, guidance_scale))
    return Sampler(name, description, nfe, draw, pipeline.unet, pipeline.scheduler.config, tuple(prompts))
