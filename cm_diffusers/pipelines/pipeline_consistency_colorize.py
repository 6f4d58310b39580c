"""Colouring with consistency models that were never trained for it."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import ImagePipelineOutput
from diffusers.utils import replace_example_docstring
from torch import Tensor
from typing_extensions import Unpack

from cm_diffusers.pipelines.editing import SamplingOptions
from cm_diffusers.pipelines.inputs import as_batch, count_of, read_images, to_tensors
from cm_diffusers.pipelines.known import Known, luma
from cm_diffusers.pipelines.pipeline_consistency_restoration import ConsistencyRestorationPipeline

EXAMPLE_DOC_STRING = """
    Examples:
        ```py
        >>> from diffusers.utils import load_image
        >>> from cm_diffusers import ConsistencyColorizePipeline

        >>> pipe = ConsistencyColorizePipeline.from_pretrained("openai/diffusers-cd_bedroom256_lpips")
        >>> coloured = pipe(load_image("room.png").convert("L"), num_inference_steps=8).images[0]
        ```
"""


class ConsistencyColorizePipeline(ConsistencyRestorationPipeline):
    r"""
    Colours for a grey image from a consistency model (Song et al. 2023, section 6).

    The result keeps the luma of the given image: 0.2989 red, 0.5870 green and 0.1140 blue, divided by their sum.
    Shares all components with [`ConsistencyPipeline`], see `from_pipe`.
    """

    @torch.no_grad()
    @replace_example_docstring(EXAMPLE_DOC_STRING)
    def __call__(  # type: ignore[override]
        self,
        image: Any,
        batch_size: int | None = None,
        num_inference_steps: int | None = 8,
        height: int | None = None,
        width: int | None = None,
        **options: Unpack[SamplingOptions],
    ) -> ImagePipelineOutput | tuple[Any, ...]:
        r"""
        Args:
            image (`PIL.Image.Image`, `np.ndarray`, `Tensor`, or a list of them):
                What to colour: grey, or of colours, whose luma is taken. Arrays have the shape
                `(batch, height, width, channels)`, tensors `(batch, channels, height, width)`, with values in [0, 1].
                Resized to the model's size.
            batch_size (`int`, *optional*):
                The number of results when `image` is a single one.
            num_inference_steps (`int`, *optional*, defaults to 8):
                The number of network evaluations.
            height, width (`int`, *optional*):
                What images are resized to; the model's own size when `None`.
            options:
                As in [`ConsistencyRestorationPipeline`].

        Examples:

        Returns:
            [`ImagePipelineOutput`] or `tuple`: the images. Colours that cannot be shown at their luma are paler.

        Raises:
            `ValueError`: for a model that knows no colours, or inputs that it cannot take.
        """
        if self.unet.config.in_channels != 3:
            raise ValueError(f"Colours need a model of 3 channels, this one has {self.unet.config.in_channels}.")
        grey = self._luma(image, *self.image_size(height, width))
        grey = as_batch(grey, count_of(grey, batch_size), "image")
        return super().__call__(Known.luma(self.in_range(grey)), num_inference_steps, **options)

    def _luma(self, image: Any, height: int | None, width: int | None) -> Tensor:
        images = to_tensors("image", image)
        if found := {part.shape[1] for part in images} - {1, 3}:
            raise ValueError(f"`image` must be grey or have 3 channels, got {found.pop()}.")
        return read_images([luma(part) if part.shape[1] == 3 else part for part in images], 1, height, width)
