"""Completing images of which a part is known, with consistency models that were never trained for it."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import ImagePipelineOutput
from diffusers.utils import replace_example_docstring
from typing_extensions import Unpack

from cm_diffusers.pipelines.editing import EditingPipeline, SamplingOptions
from cm_diffusers.pipelines.known import Known

EXAMPLE_DOC_STRING = """
    Examples:
        ```py
        >>> import torch
        >>> from cm_diffusers import ConsistencyRestorationPipeline, Known

        >>> class Fourier:
        ...     def coefficients(self, images):
        ...         return torch.fft.fft2(images, norm="ortho")
        ...
        ...     def images(self, coefficients):
        ...         return torch.fft.ifft2(coefficients, norm="ortho").real

        >>> # What a known blur, a circular convolution with `kernel`, lets through of a picture with values in [-1, 1]
        >>> response = torch.fft.fft2(kernel, s=blurred.shape[-2:])
        >>> passed = response.abs() > 0.1
        >>> seen = Fourier().coefficients(blurred) / torch.where(passed, response, 1)

        >>> pipe = ConsistencyRestorationPipeline.from_pretrained("openai/diffusers-cd_bedroom256_lpips")
        >>> sharp = pipe(Known(seen, passed, Fourier()), num_inference_steps=8).images[0]
        ```
"""


class ConsistencyRestorationPipeline(EditingPipeline):
    r"""
    Images that agree with what is known of them (Song et al. 2023, algorithm 4).

    The first noise is added to the known part, zero elsewhere, and after each jump to a clean image the known part is
    put back. In [`~cm_diffusers.ConsistencyInpaintPipeline`], [`~cm_diffusers.ConsistencyColorizePipeline`] and
    [`~cm_diffusers.ConsistencySuperResolutionPipeline`] it is pixels, luma and means; here it is whatever single
    coefficients of an orthonormal basis say. Shares all components with [`ConsistencyPipeline`], see `from_pipe`.
    """

    @torch.no_grad()
    @replace_example_docstring(EXAMPLE_DOC_STRING)
    def __call__(  # type: ignore[override]
        self, known: Known, num_inference_steps: int | None = 8, **options: Unpack[SamplingOptions]
    ) -> ImagePipelineOutput | tuple[Any, ...]:
        r"""
        Args:
            known ([`~cm_diffusers.Known`]):
                What is known of each image, in the model's range of values.
            num_inference_steps (`int`, *optional*, defaults to 8):
                The number of network evaluations. With few, what is found fits what is known less.
            options:
                `class_labels`, `timesteps`, `sigmas`, `guidance_scale`, `generator`, `latents`, `output_type`,
                `return_dict`, `callback_on_step_end` and `callback_on_step_end_tensor_inputs`, as in
                [`ConsistencyPipeline`].

        Examples:

        Returns:
            [`ImagePipelineOutput`] or `tuple`: the images. They keep what is known, up to rounding: exactly as
            `output_type="latent"`, which is not clipped, and in all others if the basis can bring values into range by
            what is not known.

        Raises:
            `ValueError`: for inputs whose shape, range or combination the model cannot take.
        """
        options = self._edit_options(options)
        known = known.to(self._execution_device)
        start = known.start()
        channels = self.unet.config.in_channels
        if start.ndim != 4 or start.shape[1] != channels:
            raise ValueError(f"What is known must be of images of {channels} channels, got {tuple(start.shape)}.")
        return self._sample(len(start), start=start, known=known, num_inference_steps=num_inference_steps, **options)
