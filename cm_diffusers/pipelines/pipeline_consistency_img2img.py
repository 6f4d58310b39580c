"""Variations of images, and images from strokes, with consistency models."""

from __future__ import annotations

import numbers
from typing import Any

import numpy as np
import torch
from diffusers import ImagePipelineOutput
from diffusers.utils import replace_example_docstring
from typing_extensions import Unpack

from cm_diffusers.pipelines.editing import EditingPipeline, SamplingOptions
from cm_diffusers.pipelines.inputs import check_count

EXAMPLE_DOC_STRING = """
    Examples:
        ```py
        >>> from diffusers.utils import load_image
        >>> from cm_diffusers import ConsistencyImg2ImgPipeline

        >>> pipe = ConsistencyImg2ImgPipeline.from_pretrained("openai/diffusers-cd_bedroom256_lpips")
        >>> strokes = load_image("strokes.png")
        >>> image = pipe(strokes, strength=0.6, num_inference_steps=2).images[0]

        >>> # At the noise levels of the paper
        >>> image = pipe(strokes, sigmas=[5.38, 2.24]).images[0]
        ```
"""


class ConsistencyImg2ImgPipeline(EditingPipeline):
    r"""
    Images that resemble a given one (Meng et al. 2021; Song et al. 2023, section 6).

    The image, strokes for instance, is given so much noise that nothing finer than wanted is left of it, and sampling
    starts there. Shares all components with [`ConsistencyPipeline`], see `from_pipe`.
    """

    @torch.no_grad()
    @replace_example_docstring(EXAMPLE_DOC_STRING)
    def __call__(  # type: ignore[override]
        self,
        image: Any,
        strength: float | None = None,
        batch_size: int | None = None,
        num_inference_steps: int = 2,
        height: int | None = None,
        width: int | None = None,
        **options: Unpack[SamplingOptions],
    ) -> ImagePipelineOutput | tuple[Any, ...]:
        r"""
        Args:
            image (`PIL.Image.Image`, `np.ndarray`, `Tensor`, or a list of them):
                What to start from. Arrays have the shape `(batch, height, width, channels)`, tensors
                `(batch, channels, height, width)`, with values in [0, 1]. Resized to the model's size.
            strength (`float`, *optional*, defaults to 0.6):
                How far from the image: the part of the noise levels, along the grid of the scheduler, that is sampled.
                Above 0; 1 starts from `sigma_max`, where next to nothing is left of the image. Levels that the
                scheduler stores for a number of steps do not count. Not together with `timesteps` or `sigmas`, which
                say the levels themselves.
            batch_size (`int`, *optional*):
                The number of results when `image` is a single one.
            num_inference_steps (`int`, *optional*, defaults to 2):
                The number of network evaluations, all of which are taken, whatever the strength.
            height, width (`int`, *optional*):
                What images are resized to; the model's own size when `None`.
            options:
                `class_labels`, `timesteps`, `sigmas`, `guidance_scale`, `generator`, `latents`, `output_type`,
                `return_dict`, `callback_on_step_end` and `callback_on_step_end_tensor_inputs`, as in
                [`ConsistencyPipeline`].

        Examples:

        Returns:
            [`ImagePipelineOutput`] or `tuple`: the images.

        Raises:
            `ValueError`: for a strength out of range, or inputs that the model cannot take.
        """
        options = self._edit_options(options)
        given = [name for name in ("timesteps", "sigmas") if options.get(name) is not None]
        if given and strength is not None:
            raise ValueError(f"Pass `strength` or `{given[0]}`, not both.")
        if not given:
            options["sigmas"] = self.levels_of(0.6 if strength is None else strength, num_inference_steps)
        images = self.preprocess(image, batch_size, *self.image_size(height, width))
        return self._sample(len(images), start=images, **options)

    def levels_of(self, strength: float, num_inference_steps: int) -> list[float]:
        """The noise levels that a strength and a number of steps stand for, descending.

        The first is at `1 - strength` of the scheduler's grid, the others spread evenly over what is left of it.

        Raises:
            `ValueError`: for a strength out of range, or more steps than the grid has levels from there.
        """
        if not (isinstance(strength, numbers.Real) and 0 < strength <= 1):
            raise ValueError(f"`strength` must lie above 0 and be at most 1, got {strength!r}.")
        check_count("num_inference_steps", num_inference_steps)
        grid = self.scheduler.grid
        first = round((1 - strength) * (len(grid) - 1))
        left = len(grid) - first
        if num_inference_steps > left:
            raise ValueError(
                f"`strength={strength}` leaves {left} noise levels of the grid, less than "
                f"`num_inference_steps={num_inference_steps}`."
            )
        levels: list[float] = grid[first + np.arange(num_inference_steps) * left // num_inference_steps].tolist()
        return levels
