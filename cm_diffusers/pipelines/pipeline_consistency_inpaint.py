"""Inpainting with consistency models that were never trained for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import PIL.Image
import torch
from diffusers import ImagePipelineOutput
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import replace_example_docstring
from torch import Tensor

from cm_diffusers.pipelines.known import Known
from cm_diffusers.pipelines.pipeline_consistency import ConsistencyPipeline

EXAMPLE_DOC_STRING = """
    Examples:
        ```py
        >>> from diffusers.utils import load_image
        >>> from cm_diffusers import ConsistencyInpaintPipeline

        >>> pipe = ConsistencyInpaintPipeline.from_pretrained("openai/diffusers-cd_bedroom256_lpips")
        >>> image, mask = load_image("room.png"), load_image("mask.png")  # white is repainted
        >>> repainted = pipe(image, mask, num_inference_steps=8).images[0]
        ```
"""


class ConsistencyInpaintPipeline(ConsistencyPipeline):
    r"""
    Repainting a part of an image with a consistency model (Song et al. 2023, section 6).

    After each jump to a clean image its known part is put back, so that the result keeps the given image, to the bit
    in the model's range of values, wherever the mask is black. Shares all components with [`ConsistencyPipeline`], see
    `from_pipe`; its arguments are the same.
    """

    @torch.no_grad()
    @replace_example_docstring(EXAMPLE_DOC_STRING)
    def __call__(  # type: ignore[override]
        self,
        image: Any,
        mask_image: Any,
        batch_size: int | None = None,
        class_labels: Tensor | Sequence[int] | int | None = None,
        num_inference_steps: int | None = 8,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
        guidance_scale: float = 1.0,
        height: int | None = None,
        width: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str | None = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, Tensor, dict[str, Tensor]], dict[str, Tensor] | None] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> ImagePipelineOutput | tuple[Any, ...]:
        r"""
        Args:
            image (`PIL.Image.Image`, `np.ndarray`, `Tensor`, or a list of them):
                What to repaint. Arrays have the shape `(batch, height, width, channels)`, tensors
                `(batch, channels, height, width)`, with values in [0, 1]. Resized to the model's size.
            mask_image (like `image`, one channel):
                White, above 1/2, is repainted and black is kept. One for all images, or one for each.
            batch_size (`int`, *optional*):
                The number of results when `image` is a single one.
            num_inference_steps (`int`, *optional*, defaults to 8):
                The number of network evaluations. With few, the repainted part fits its surroundings less.
            class_labels, timesteps, sigmas, guidance_scale, height, width, generator, latents, output_type,
            return_dict, callback_on_step_end, callback_on_step_end_tensor_inputs:
                As in [`ConsistencyPipeline`].

        Examples:

        Returns:
            [`ImagePipelineOutput`] or `tuple`: the images.

        Raises:
            `ValueError`: for inputs whose shape, range or combination the model cannot take.
        """
        height, width = self.image_size(height, width)
        known = self._known(image, mask_image, batch_size, height, width)
        batch_size, _, height, width = known.values.shape
        self._check_inputs(batch_size, generator, output_type, callback_on_step_end_tensor_inputs, guidance_scale)
        self._set_timesteps(num_inference_steps, timesteps, sigmas)
        self.scheduler.init_noise_sigma = float(self.scheduler.sigmas[0])  # also where stock images start higher
        noise = self.prepare_latents(batch_size, height, width, self._execution_device, generator, latents)
        class_labels = self.prepare_class_labels(batch_size, self._execution_device, class_labels, generator)
        latents = self._denoise(
            known.start() + noise, class_labels, guidance_scale, generator, callback_on_step_end,
            callback_on_step_end_tensor_inputs, known,
        )  # fmt: skip
        return self._output(latents, output_type, return_dict)

    def _known(
        self, image: Any, mask_image: Any, batch_size: int | None, height: int | None, width: int | None
    ) -> Known:
        if batch_size is not None and (not isinstance(batch_size, int) or batch_size < 1):
            raise ValueError(f"`batch_size` must be a positive integer, got {batch_size!r}.")
        channels, (low, high) = self.unet.config.in_channels, self.scheduler.config.image_range
        images = self.image_processor.preprocess(_in_mode(image, channels), height, width)
        if images.shape[1] != channels:
            raise ValueError(f"`image` must have {channels} channels, got {images.shape[1]}.")
        if images.min() < 0 or images.max() > 1:
            raise ValueError(
                f"`image` must have values in [0, 1], got [{float(images.min()):g}, {float(images.max()):g}]."
            )
        masks = VaeImageProcessor(
            vae_scale_factor=1, do_normalize=False, do_binarize=True, do_convert_grayscale=True, resample="nearest"
        ).preprocess(_as_float(mask_image), *images.shape[-2:])
        if masks.shape[1] != 1:
            raise ValueError(f"`mask_image` must have one channel, got {masks.shape[1]}.")
        count = len(images) if batch_size is None else batch_size
        for name, given in (("image", images), ("mask_image", masks)):
            if len(given) not in (1, count):
                raise ValueError(f"Got {len(given)} for `{name}`, need one or {count}.")
        values = (images * (high - low) + low).expand(count, *images.shape[1:])
        device = self._execution_device
        return Known(values.to(device, self.unet.dtype), (masks < 0.5).to(device))


def _as_float(mask: Any) -> Any:
    """Masks of booleans as numbers, which can be resized."""
    if isinstance(mask, list):
        return [_as_float(one) for one in mask]
    if isinstance(mask, np.ndarray) and mask.dtype == bool:
        return mask.astype(np.float32)
    return mask.float() if isinstance(mask, Tensor) and mask.dtype == torch.bool else mask


def _in_mode(image: Any, channels: int) -> Any:
    """PIL images in the model's mode: grey pictures for models of colour, and the other way round."""
    if isinstance(image, list):
        return [_in_mode(one, channels) for one in image]
    mode = {1: "L", 3: "RGB", 4: "RGBA"}.get(channels)
    return image.convert(mode) if isinstance(image, PIL.Image.Image) and mode else image
