"""What a student draws while it trains: each image from its own seed."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from cm_diffusers.pipelines import ConsistencyPipeline
from cm_diffusers.pipelines.text import draw_prompts, prompts_in_turn, told_guidance
from cm_diffusers.training.config import ConsistencyConfig
from cm_diffusers.training.loading import first_images
from cm_diffusers.training.randomness import generators, labels_in_turn
from cm_diffusers.training.text_to_image import TextToImage

# From seeds and a number of steps to as many images of shape `(height, width, channels)`, with values in [0, 1].
Draw = Callable[[Sequence[int], int], np.ndarray]


def prompts_to_draw(config: ConsistencyConfig, dataset: Any) -> Sequence[str]:
    """The config's prompts, or else the first captions of its dataset: those of a stream, only before training."""
    if config.sample_prompts:
        return config.sample_prompts
    captions: Sequence[str] = first_images(dataset, min(config.num_samples, 64)).get("captions", [""])
    return captions


def drawing(pipeline: Any, config: ConsistencyConfig, text: TextToImage | None, prompts: Sequence[str]) -> Draw:
    """How a run draws from its student's pipeline: all classes in turn, or prompts.

    Args:
        text ([`~cm_diffusers.training.text_to_image.TextToImage`], *optional*): of a student that takes prompts.
        prompts (`Sequence[str]`): that it is given.
    """
    pipeline.set_progress_bar_config(disable=True)
    if text is None:
        return functools.partial(_draw_classes, pipeline)
    return functools.partial(_draw_prompts, text.on_device(pipeline), prompts, run_guidance(config))


def _draw_classes(pipeline: ConsistencyPipeline, seeds: Sequence[int], nfe: int) -> np.ndarray:
    options = {"num_inference_steps": nfe, "generator": generators(seeds), "output_type": "np"}
    labels = labels_in_turn(pipeline.classes, seeds)
    images: np.ndarray = pipeline(batch_size=len(seeds), class_labels=labels, **options).images
    return images


def _draw_prompts(
    pipeline: Any, prompts: Sequence[str], guidance_scale: float, seeds: Sequence[int], nfe: int
) -> np.ndarray:
    images = draw_prompts(pipeline, prompts_in_turn(prompts, seeds), nfe, guidance_scale, generators(seeds))
    array: np.ndarray = images.permute(0, 2, 3, 1).cpu().numpy()
    return array


def run_guidance(config: ConsistencyConfig) -> float:
    """The guidance scale that a run's student is told; 1 if it is told none."""
    return 1.0 if config.w_min is None else told_guidance(vars(config))
