"""Inpainting with consistency models that were never trained for it."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import ImagePipelineOutput
from diffusers.utils import replace_example_docstring
from typing_extensions import Unpack

from cm_diffusers.pipelines.editing import SamplingOptions
from cm_diffusers.pipelines.inputs import (
    as_batch,
    check_number,
    check_sizes,
    count_of,
    one_by_one,
    read_masks,
    to_tensors,
    unmasked,
)
from cm_diffusers.pipelines.known import Known
from cm_diffusers.pipelines.pipeline_consistency_restoration import ConsistencyRestorationPipeline

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


class ConsistencyInpaintPipeline(ConsistencyRestorationPipeline):
    r"""
    Repainting a part of an image with a consistency model (Song et al. 2023, section 6).

    The result keeps the given image, to the bit in the model's range of values, wherever the mask is black. Sampling
    starts from noise that is added to the image with zeros under the mask, as the paper has it; the published code
    fills the mask with black instead. Shares all components with [`ConsistencyPipeline`], see `from_pipe`.
    """

    @torch.no_grad()
    @replace_example_docstring(EXAMPLE_DOC_STRING)
    def __call__(  # type: ignore[override]
        self,
        image: Any,
        mask_image: Any,
        batch_size: int | None = None,
        num_inference_steps: int | None = 8,
        height: int | None = None,
        width: int | None = None,
        **options: Unpack[SamplingOptions],
    ) -> ImagePipelineOutput | tuple[Any, ...]:
        r"""
        Args:
            image (`PIL.Image.Image`, `np.ndarray`, `Tensor`, or a list of them):
                What to repaint. Arrays have the shape `(batch, height, width, channels)`, tensors
                `(batch, channels, height, width)`, with values in [0, 1]. Resized to the model's size.
            mask_image (like `image`, one channel; or booleans, or 0 and 1):
                White, above 1/2, is repainted and black is kept. Of the size of `image`; one for all, or one for each.
                Where both are reduced, a pixel is repainted that any white one lies in.
            batch_size (`int`, *optional*):
                The number of results when `image` is a single one.
            num_inference_steps (`int`, *optional*, defaults to 8):
                The number of network evaluations. With few, the repainted part fits its surroundings less.
            height, width (`int`, *optional*):
                What images and masks are resized to; the model's own size when `None`.
            options:
                As in [`ConsistencyRestorationPipeline`].

        Examples:

        Returns:
            [`ImagePipelineOutput`] or `tuple`: the images.

        Raises:
            `ValueError`: for inputs whose shape, range or combination the model cannot take.
        """
        images = one_by_one(to_tensors("image", image, self.unet.config.in_channels))
        masks = one_by_one(to_tensors("mask_image", mask_image, 1, is_mask=True))
        check_sizes(images, masks)
        size = self.image_size(height, width)
        count = count_of(images, batch_size)
        check_number(images, count, "image")
        unknown = as_batch(read_masks(masks, *size), count, "mask_image")
        known = Known(self.preprocess(unmasked(images, masks, *size), count, *size), ~unknown)
        return super().__call__(known, num_inference_steps, **options)
