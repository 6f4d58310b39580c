"""What a student draws while it trains: each image from its own seed."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from cm_diffusers.network_config import class_labels
from cm_diffusers.pipelines.text import draw_prompts, prompts_in_turn
from cm_diffusers.training.config import ConsistencyConfig
from cm_diffusers.training.randomness import generators, labels_in_turn

# From seeds and a number of steps to as many images of shape `(height, width, channels)`, with values in [0, 1].
Draw = Callable[[Sequence[int], int], np.ndarray]


def of_classes(pipeline: Any) -> Draw:
    """The images of a [`ConsistencyPipeline`]; of a class-conditional one, of all classes in turn."""
    return functools.partial(_draw_classes, pipeline)


def _draw_classes(pipeline: Any, seeds: Sequence[int], nfe: int) -> np.ndarray:
    classes = class_labels(pipeline.unet.config, pipeline.config.null_class_label)
    options = {"num_inference_steps": nfe, "generator": generators(seeds), "output_type": "np"}
    images: np.ndarray = pipeline(batch_size=len(seeds), class_labels=labels_in_turn(classes, seeds), **options).images
    return images


def of_prompts(pipeline: Any, prompts: Sequence[str], guidance_scale: float) -> Draw:
    """The images of a text-to-image pipeline, of some prompts in turn.

    Args:
        guidance_scale (`float`): that the student is told; 1 for one that is not told any.
    """
    return functools.partial(_draw_prompts, pipeline, prompts, guidance_scale)


def _draw_prompts(
    pipeline: Any, prompts: Sequence[str], guidance_scale: float, seeds: Sequence[int], nfe: int
) -> np.ndarray:
    images = draw_prompts(pipeline, prompts_in_turn(prompts, seeds), nfe, guidance_scale, generators(seeds))
    array: np.ndarray = images.permute(0, 2, 3, 1).cpu().numpy()
    return array


def told_guidance(config: ConsistencyConfig) -> float:
    """The guidance scale that a run's student is told: the middle of those of its training; 1 if it is told none."""
    return 1.0 if config.w_min is None or config.w_max is None else 1 + (config.w_min + config.w_max) / 2
