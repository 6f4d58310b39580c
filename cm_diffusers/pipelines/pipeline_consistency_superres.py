"""Super-resolution with consistency models that were never trained for it."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import ImagePipelineOutput
from diffusers.utils import replace_example_docstring
from typing_extensions import Unpack

from cm_diffusers.pipelines.editing import SamplingOptions
from cm_diffusers.pipelines.known import Known
from cm_diffusers.pipelines.pipeline_consistency_restoration import ConsistencyRestorationPipeline

EXAMPLE_DOC_STRING = """
    Examples:
        ```py
        >>> from diffusers.utils import load_image
        >>> from cm_diffusers import ConsistencySuperResolutionPipeline

        >>> pipe = ConsistencySuperResolutionPipeline.from_pretrained("openai/diffusers-cd_bedroom256_lpips")
        >>> large = pipe(load_image("room-64.png"), factor=4, num_inference_steps=8).images[0]
        ```
"""


class ConsistencySuperResolutionPipeline(ConsistencyRestorationPipeline):
    r"""
    Larger images from small ones with a consistency model (Song et al. 2023, section 6).

    A pixel of the given image is the mean of a square patch of the result. Shares all components with
    [`ConsistencyPipeline`], see `from_pipe`.
    """

    @torch.no_grad()
    @replace_example_docstring(EXAMPLE_DOC_STRING)
    def __call__(  # type: ignore[override]
        self,
        image: Any,
        factor: int | None = None,
        batch_size: int | None = None,
        num_inference_steps: int | None = 8,
        **options: Unpack[SamplingOptions],
    ) -> ImagePipelineOutput | tuple[Any, ...]:
        r"""
        Args:
            image (`PIL.Image.Image`, `np.ndarray`, `Tensor`, or a list of them):
                What to enlarge, square or not. Arrays have the shape `(batch, height, width, channels)`, tensors
                `(batch, channels, height, width)`, with values in [0, 1].
            factor (`int`, *optional*):
                How many times as high and wide the result is; what leads to the model's own size when `None`.
            batch_size (`int`, *optional*):
                The number of results when `image` is a single one.
            num_inference_steps (`int`, *optional*, defaults to 8):
                The number of network evaluations.
            options:
                As in [`ConsistencyRestorationPipeline`].

        Examples:

        Returns:
            [`ImagePipelineOutput`] or `tuple`: the images.

        Raises:
            `ValueError`: if no whole factor leads from the image's size to the model's, or for inputs that the model
            cannot take.
        """
        means = self.preprocess(image, batch_size)
        factor = self._factor(means.shape[-2], means.shape[-1]) if factor is None else factor
        return super().__call__(Known.patch_means(means, factor), num_inference_steps, **options)

    def _factor(self, height: int, width: int) -> int:
        model_height, model_width = self.image_size()
        if model_height is None or model_width is None:
            raise ValueError("The model's config has no `sample_size`: pass `factor`.")
        factor = model_height // height
        if factor < 2 or (factor * height, factor * width) != (model_height, model_width):
            raise ValueError(
                f"No whole factor leads from {height} x {width} pixels to the model's {model_height} x {model_width}: "
                "resize the image, or pass `factor`."
            )
        return factor
