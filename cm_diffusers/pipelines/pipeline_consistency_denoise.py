"""Denoising with consistency models."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import ImagePipelineOutput
from diffusers.utils import replace_example_docstring
from torch import Tensor
from typing_extensions import Unpack

from cm_diffusers.pipelines.editing import EditingPipeline, SamplingOptions
from cm_diffusers.pipelines.inputs import check_count, read_images

EXAMPLE_DOC_STRING = """
    Examples:
        ```py
        >>> from diffusers.utils import load_image
        >>> from cm_diffusers import ConsistencyDenoisePipeline

        >>> pipe = ConsistencyDenoisePipeline.from_pretrained("openai/diffusers-cd_bedroom256_lpips")
        >>> clean = pipe(load_image("noisy.png")).images[0]
        ```
"""
# The median of the absolute value of a standard normal variable.
NORMAL_MEDIAN = 0.6745


class ConsistencyDenoisePipeline(EditingPipeline):
    r"""
    Images without their noise (Song et al. 2023, section 6).

    A noisy image is a state of the diffusion at its own noise level: sampling starts there, and adds no noise before
    the first jump. Shares all components with [`ConsistencyPipeline`], see `from_pipe`.
    """

    @torch.no_grad()
    @replace_example_docstring(EXAMPLE_DOC_STRING)
    def __call__(  # type: ignore[override]
        self,
        image: Any,
        noise_level: float | None = None,
        num_inference_steps: int = 1,
        **options: Unpack[SamplingOptions],
    ) -> ImagePipelineOutput | tuple[Any, ...]:
        r"""
        Args:
            image (`PIL.Image.Image`, `np.ndarray`, `Tensor`, or a list of them):
                What to denoise. Arrays have the shape `(batch, height, width, channels)`, tensors
                `(batch, channels, height, width)`. Clean values lie in [0, 1]; noisy ones may leave it, and are better
                not clipped to it.
            noise_level (`float`, *optional*):
                The standard deviation of the noise, up to 1, which is white. Estimated from all images together when
                `None`, see [`estimate_noise_level`].
            num_inference_steps (`int`, *optional*, defaults to 1):
                The number of network evaluations; fewer where an estimated level leaves fewer. Further ones give noise
                back, less and less, and lead to a sharper image with details that were not seen.
            options:
                `class_labels`, `sigmas` (the first is the image's own noise level, in the model's range of values),
                `guidance_scale`, `generator`, `output_type`, `return_dict`, `callback_on_step_end` and
                `callback_on_step_end_tensor_inputs`, as in [`ConsistencyPipeline`].

        Examples:

        Returns:
            [`ImagePipelineOutput`] or `tuple`: the images.

        Raises:
            `ValueError`: for a noise level that the model was not trained at, or inputs that it cannot take.
        """
        options = self._edit_options(options)
        for name in ("latents", "timesteps"):
            if options.get(name) is not None:
                raise ValueError(f"`{name}` cannot be chosen: sampling starts from the image, at its noise level.")
        images = read_images(image, self.unet.config.in_channels, check_range=False)
        if options.get("sigmas") is None:
            options["sigmas"] = self._levels(images, noise_level, num_inference_steps)
        elif noise_level is not None:
            raise ValueError("Pass `noise_level` or `sigmas`, not both.")
        options["latents"] = torch.zeros_like(images)  # no noise beside the image's own
        return self._sample(len(images), start=self.in_range(images), **options)

    def _levels(self, images: Tensor, noise_level: float | None, num_inference_steps: int) -> list[float]:
        low, high = self.scheduler.config.image_range
        lowest, highest = self.scheduler.config.sigma_min, self.scheduler.config.sigma_max
        if noise_level is None:
            sigma = min(max(estimate_noise_level(images) * (high - low), lowest), highest)
            steps = check_count("num_inference_steps", num_inference_steps)
            return self.levels_below(sigma, min(steps, len(self._below(sigma)) + 1))
        bounds = lowest / (high - low), min(highest / (high - low), 1.0)
        if not bounds[0] <= noise_level <= bounds[1]:
            raise ValueError(f"`noise_level` must lie in [{bounds[0]:g}, {bounds[1]:g}], got {noise_level}.")
        return self.levels_below(noise_level * (high - low), num_inference_steps)

    def levels_below(self, sigma: float, num_inference_steps: int) -> list[float]:
        """A noise level, and others of the scheduler's grid spread evenly below it, descending.

        Raises:
            `ValueError`: if the grid has not so many.
        """
        check_count("num_inference_steps", num_inference_steps)
        below = self._below(sigma)
        if num_inference_steps > len(below) + 1:
            raise ValueError(
                f"`num_inference_steps={num_inference_steps}` exceeds the {len(below) + 1} noise levels from "
                f"{sigma:g} down."
            )
        return [sigma, *(below[i * len(below) // num_inference_steps] for i in range(1, num_inference_steps))]

    def _below(self, sigma: float) -> list[float]:
        return [level for level in self.scheduler.grid.tolist() if level < sigma * (1 - 1e-6)]


def estimate_noise_level(images: Tensor) -> float:
    """The standard deviation of white noise on images, from the finest diagonal details of all of them.

    These are hardly anything but noise: the median of their size is 0.6745 times its deviation (Donoho & Johnstone
    1994). Fine textures count as noise, so that it is too high for small images of much detail.

    Args:
        images (`Tensor` of shape `(batch, channels, height, width)`): of at least 2 x 2 pixels.
    """
    height, width = (size // 2 * 2 for size in images.shape[-2:])
    if not (height and width):
        raise ValueError(f"Images of {images.shape[-2]} x {images.shape[-1]} pixels say nothing of their noise.")
    even, odd = images[..., 0:height:2, :width], images[..., 1:height:2, :width]
    details = (even[..., 0::2] - even[..., 1::2] - odd[..., 0::2] + odd[..., 1::2]) / 2
    return float(details.abs().float().median()) / NORMAL_MEDIAN
