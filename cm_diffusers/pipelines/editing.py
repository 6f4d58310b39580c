"""What pipelines that edit have in common."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypedDict

import torch
from torch import Tensor

from cm_diffusers.pipelines.inputs import as_batch, count_of, read_images
from cm_diffusers.pipelines.pipeline_consistency import ConsistencyPipeline


class SamplingOptions(TypedDict, total=False):
    """What pipelines that edit take as [`ConsistencyPipeline`] does, beside the number of steps."""

    class_labels: Tensor | Sequence[int] | int | None
    timesteps: Sequence[float] | None
    sigmas: Sequence[float] | None
    guidance_scale: float
    generator: torch.Generator | list[torch.Generator] | None
    latents: Tensor | None
    output_type: str | None
    return_dict: bool
    callback_on_step_end: Callable[[Any, int, Tensor, dict[str, Tensor]], dict[str, Tensor] | None] | None
    callback_on_step_end_tensor_inputs: Sequence[str]


class EditingPipeline(ConsistencyPipeline):
    """A [`ConsistencyPipeline`] that begins with images."""

    def _checked(self, options: SamplingOptions) -> SamplingOptions:
        """A copy.

        Raises:
            `TypeError`: for what is no option.
        """
        if unknown := sorted(options.keys() - SamplingOptions.__annotations__.keys()):
            raise TypeError(f"{type(self).__name__} takes no argument {unknown[0]!r}.")
        return options.copy()

    def _edit_options(self, options: SamplingOptions) -> SamplingOptions:
        """A copy for an edit. Images whose class is not given have none, if the student was trained with that.

        Raises:
            `ValueError`: for guidance towards no class.
        """
        found = self._checked(options)
        if found.get("class_labels") is None and self.classes:
            found["class_labels"] = self.config.null_class_label
            if found["class_labels"] is not None and found.get("guidance_scale", 1.0) != 1:
                raise ValueError("`guidance_scale` leads towards a class: pass `class_labels`.")
        return found

    def preprocess(
        self, image: Any, batch_size: int | None = None, height: int | None = None, width: int | None = None
    ) -> Tensor:
        """Images as users have them, in the model's range of values, as many as results are wanted.

        Args:
            image: see [`~cm_diffusers.pipelines.inputs.read_images`].
            batch_size (`int`, *optional*): the number of results; as many as there are images when `None`.
            height, width (`int`, *optional*): what they are resized to; their own size when `None`.

        Raises:
            `ValueError`: for what is no image of this model.
        """
        images = read_images(image, self.unet.config.in_channels, height, width)
        return self.in_range(as_batch(images, count_of(images, batch_size), "image"))

    def in_range(self, images: Tensor) -> Tensor:
        """From [0, 1] to the model's range of values."""
        low, high = self.scheduler.config.image_range
        return images * (high - low) + low
