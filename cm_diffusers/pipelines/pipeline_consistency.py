"""Sampling from consistency models in one step or a few."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers import ImagePipelineOutput, UNet2DModel
from diffusers.image_processor import VaeImageProcessor
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import logging, replace_example_docstring
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from cm_diffusers.network_config import check_size, class_labels
from cm_diffusers.networks import network_output
from cm_diffusers.pipelines.known import Known
from cm_diffusers.pipelines.stored import StoredPipeline
from cm_diffusers.schedulers.scheduling_consistency import STOCK_CLASS, ConsistencyScheduler

logger = logging.get_logger(__name__)

OUTPUT_TYPES = ("pil", "np", "pt", "latent")
EXAMPLE_DOC_STRING = """
    Examples:
        ```py
        >>> import torch
        >>> from cm_diffusers import ConsistencyPipeline

        >>> pipe = ConsistencyPipeline.from_pretrained("openai/diffusers-cd_imagenet64_l2", torch_dtype=torch.float16)
        >>> pipe.to("cuda")

        >>> # One step
        >>> image = pipe(num_inference_steps=1, class_labels=145).images[0]

        >>> # Two steps, at chosen noise levels; the same images in a batch of any size
        >>> seeds = [torch.Generator("cuda").manual_seed(i) for i in range(4)]
        >>> images = pipe(batch_size=4, sigmas=[80.0, 1.4], class_labels=[145] * 4, generator=seeds).images
        ```
"""


class ConsistencyPipeline(StoredPipeline):
    r"""
    Unconditional or class-conditional image generation with a consistency model.

    Loads students made by [`~cm_diffusers.ConsistencyTrainer`] and published consistency models alike. Where stock
    `ConsistencyModelPipeline` computes the same, the saved pipeline carries that name and loads there, too.

    Args:
        unet ([`UNet2DModel`]):
            The student.
        scheduler ([`ConsistencyScheduler`]):
            The description of the student, and its sampler. A `CMStochasticIterativeScheduler` is upgraded.
        null_class_label (`int`, *optional*):
            The class label that stands for "no class", if the student was trained with one; needed for guidance.
    """

    model_cpu_offload_seq = "unet"
    _callback_tensor_inputs = ["latents"]

    def __init__(self, unet: UNet2DModel, scheduler: SchedulerMixin, null_class_label: int | None = None) -> None:
        super().__init__()
        if not isinstance(scheduler, ConsistencyScheduler):
            if type(scheduler).__name__ != STOCK_CLASS:
                raise ValueError(
                    f"A consistency model runs under ConsistencyScheduler or {STOCK_CLASS}, got "
                    f"{type(scheduler).__name__}. To distil a diffusion model, see `cm_diffusers.ConsistencyTrainer`."
                )
            scheduler = ConsistencyScheduler.from_config(scheduler.config)
        self.register_modules(unet=unet, scheduler=scheduler)
        self.register_to_config(null_class_label=null_class_label)
        if self.scheduler.config.flow_map and _in_precision not in unet.class_embedding._forward_pre_hooks.values():
            unet.class_embedding.register_forward_pre_hook(_in_precision)
        self._interrupt = False

    # Sampling -------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    @replace_example_docstring(EXAMPLE_DOC_STRING)
    def __call__(
        self,
        batch_size: int = 1,
        class_labels: Tensor | Sequence[int] | int | None = None,
        num_inference_steps: int | None = 1,
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
            batch_size (`int`, *optional*, defaults to 1):
                The number of images.
            class_labels (`Tensor`, `list[int]` or `int`, *optional*):
                For class-conditional models: one label per image, or one for all. Drawn with `generator` when `None`.
            num_inference_steps (`int`, *optional*, defaults to 1):
                The number of network evaluations. Ignored when `timesteps` or `sigmas` are given.
            timesteps (`list`, *optional*):
                Custom timesteps in descending order, see [`ConsistencyScheduler.set_timesteps`].
            sigmas (`list[float]`, *optional*):
                Custom noise levels in descending order.
            guidance_scale (`float`, *optional*, defaults to 1.0):
                Classifier-free guidance, for students trained with a null class; 1 is off.
            height, width (`int`, *optional*):
                Image size in pixels; the size the model was trained with when `None`.
            generator (`torch.Generator` or a list of one per image, *optional*):
                Makes sampling deterministic. With a list, each image depends on its own generator alone.
            latents (`Tensor` of shape `(batch, channels, height, width)`, *optional*):
                Unit-variance noise to start from.
            output_type (`str`, *optional*, defaults to `"pil"`):
                `"pil"`, `"np"`, `"pt"` (values in [0, 1]) or `"latent"` (the model's own range, not clipped).
            return_dict (`bool`, *optional*, defaults to `True`):
                Return an [`ImagePipelineOutput`] rather than a tuple.
            callback_on_step_end (`Callable`, *optional*):
                Called after each step as `callback(pipeline, step, timestep, tensors)`; a dict it returns replaces
                those tensors.
            callback_on_step_end_tensor_inputs (`list[str]`, *optional*):
                The tensors the callback gets, out of `latents`.

        Examples:

        Returns:
            [`ImagePipelineOutput`] or `tuple`: the images.

        Raises:
            `ValueError`: for inputs whose shape, range or combination the model cannot take.
        """
        return self._sample(
            batch_size, height, width, class_labels=class_labels, num_inference_steps=num_inference_steps,
            timesteps=timesteps, sigmas=sigmas, guidance_scale=guidance_scale, generator=generator, latents=latents,
            output_type=output_type, return_dict=return_dict, callback_on_step_end=callback_on_step_end,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
        )  # fmt: skip

    def _sample(
        self,
        batch_size: int,
        height: int | None = None,
        width: int | None = None,
        start: Tensor | None = None,
        known: Known | None = None,
        *,
        class_labels: Tensor | Sequence[int] | int | None = None,
        num_inference_steps: int | None = 1,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
        guidance_scale: float = 1.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str | None = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, Tensor, dict[str, Tensor]], dict[str, Tensor] | None] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> ImagePipelineOutput | tuple[Any, ...]:
        """From noise to images, for this pipeline and those that edit.

        Args:
            start (`Tensor` of shape `(batch, channels, height, width)`, *optional*): what the first noise is added to,
                in the model's range of values.
            known ([`~cm_diffusers.pipelines.known.Known`], *optional*): what is put back after each step.
        """
        self._check_inputs(batch_size, generator, output_type, callback_on_step_end_tensor_inputs, guidance_scale)
        if timesteps is not None or sigmas is not None:
            num_inference_steps = None
        device = self._execution_device
        self.scheduler.set_timesteps(num_inference_steps, device=device, timesteps=timesteps, sigmas=sigmas)
        if start is None:
            latents = self.prepare_latents(batch_size, height, width, device, generator, latents)
        else:
            height, width = start.shape[-2:]
            noise = self.prepare_noise(batch_size, height, width, device, generator, latents)
            latents = self._noisy(start, noise)
        class_labels = self.prepare_class_labels(batch_size, device, class_labels, generator)
        latents = self._denoise(
            latents, class_labels, guidance_scale, generator, callback_on_step_end,
            callback_on_step_end_tensor_inputs, known,
        )  # fmt: skip
        if known is not None:
            latents = known.put_back(latents.float())  # whatever the network's precision
            if output_type != "latent":
                latents = known.into_range(latents, *self.scheduler.config.image_range)
        image = self.postprocess(latents, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=image) if return_dict else (image,)

    def _denoise(
        self,
        latents: Tensor,
        class_labels: Tensor | None,
        guidance_scale: float,
        generator: torch.Generator | list[torch.Generator] | None,
        callback_on_step_end: Callable[..., dict[str, Tensor] | None] | None,
        tensor_inputs: Sequence[str],
        known: Known | None = None,
    ) -> Tensor:
        """Step through the scheduler's levels. What is `known` of the image is put back after each jump to it."""
        conditioning = self._conditioning(class_labels, guidance_scale)
        self._num_timesteps = len(self.scheduler.timesteps)
        self._interrupt = False
        with self.progress_bar(total=self._num_timesteps) as progress_bar:
            for i, t in enumerate(self.scheduler.timesteps):
                if self._interrupt:
                    continue
                if self.scheduler.config.flow_map:
                    conditioning = {"class_labels": self.scheduler.target_timesteps[i].expand(len(latents))}
                model_output = self._predict(latents, t, conditioning, guidance_scale)
                noisier, denoised = self.scheduler.step(model_output, t, latents, generator, return_dict=False)
                latents = noisier
                if known is not None:
                    latents = noisier + self.scheduler.denoised_share(i) * (known.put_back(denoised) - denoised)
                if callback_on_step_end is not None:
                    tensors = {name: {"latents": latents}[name] for name in tensor_inputs}
                    latents = (callback_on_step_end(self, i, t, tensors) or {}).get("latents", latents)
                progress_bar.update()
        return latents

    def _predict(self, latents: Tensor, t: Tensor, conditioning: dict[str, Tensor], guidance_scale: float) -> Tensor:
        scaled = self.scheduler.scale_model_input(latents, t)
        if guidance_scale == 1:
            return network_output(self.unet, scaled, t, **conditioning)
        output = network_output(self.unet, torch.cat([scaled] * 2), t, **conditioning)
        conditional, unconditional = output.chunk(2)
        return unconditional + guidance_scale * (conditional - unconditional)

    def _conditioning(self, class_labels: Tensor | None, guidance_scale: float) -> dict[str, Tensor]:
        if class_labels is None:
            return {}
        if guidance_scale != 1:
            null = torch.full_like(class_labels, self.config.null_class_label)
            class_labels = torch.cat([class_labels, null])
        return {"class_labels": class_labels}

    def image_size(self, height: int | None = None, width: int | None = None) -> tuple[int | None, int | None]:
        """Height and width in pixels: those given, otherwise the model's own, `None` where it has none."""
        size = self.unet.config.sample_size
        default_height, default_width = (size, size) if isinstance(size, int) or size is None else size
        return height or default_height, width or default_width

    def prepare_latents(
        self,
        batch_size: int,
        height: int | None,
        width: int | None,
        device: torch.device,
        generator: torch.Generator | list[torch.Generator] | None,
        latents: Tensor | None = None,
    ) -> Tensor:
        """The first state: [`~ConsistencyPipeline.prepare_noise`] times `init_noise_sigma`."""
        noise = self.prepare_noise(batch_size, height, width, device, generator, latents)
        return noise * self.scheduler.init_noise_sigma

    def prepare_noise(
        self,
        batch_size: int,
        height: int | None,
        width: int | None,
        device: torch.device,
        generator: torch.Generator | list[torch.Generator] | None,
        latents: Tensor | None = None,
    ) -> Tensor:
        """Noise of unit variance, drawn or given, on `device` and in the network's precision."""
        height, width = self.image_size(height, width)
        if latents is not None:
            height, width = height or latents.shape[-2], width or latents.shape[-1]
        if height is None or width is None:
            raise ValueError("The model's config has no `sample_size`: pass `height` and `width`.")
        check_size(self.unet.config, height, width)
        shape = (batch_size, self.unet.config.in_channels, height, width)
        if latents is None:
            # In float32, whatever the network's precision: some versions of torch draw other numbers in half of it.
            latents = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        elif tuple(latents.shape) != shape:
            raise ValueError(f"`latents` must have the shape {shape}, got {tuple(latents.shape)}.")
        return latents.to(device, self.unet.dtype)

    def _noisy(self, start: Tensor, noise: Tensor) -> Tensor:
        """The state of the first level around images, in the precision of `noise`: half of it holds no large sigma."""
        sigma, dtype = self.scheduler.sigmas[0], torch.promote_types(noise.dtype, torch.float32)
        state = start.to(noise.device, dtype) + float(sigma) * noise.to(dtype)
        return (state / self.scheduler.state_scale(sigma)).to(noise.dtype)

    @property
    def classes(self) -> list[int]:
        """The labels that stand for a class; none of an unconditional model."""
        return class_labels(self.unet.config, self.config.null_class_label)

    def prepare_class_labels(
        self,
        batch_size: int,
        device: torch.device,
        class_labels: Tensor | Sequence[int] | int | None,
        generator: torch.Generator | list[torch.Generator] | None = None,
    ) -> Tensor | None:
        """One label per image, on `device`; drawn when `None`; `None` for unconditional models."""
        num_classes = self.unet.config.num_class_embeds
        if num_classes is None:
            if class_labels is not None:
                raise ValueError("`class_labels` were passed, but the model is not class-conditional.")
            return None
        if class_labels is None:
            return self._draw_labels(batch_size, generator).to(device)
        labels = torch.as_tensor(class_labels).reshape(-1)
        if labels.is_floating_point() or labels.dtype == torch.bool:
            raise ValueError(f"`class_labels` must be integers, got {labels.dtype}.")
        if len(labels) not in (1, batch_size):
            raise ValueError(f"Got {len(labels)} `class_labels` for `batch_size={batch_size}`.")
        if labels.min() < 0 or labels.max() >= num_classes:
            raise ValueError(f"`class_labels` must lie in [0, {num_classes}), got {labels.tolist()}.")
        return labels.expand(batch_size).to(device)

    def _draw_labels(self, batch_size: int, generator: Any) -> Tensor:
        if isinstance(generator, list) and len(generator) == 1:
            generator = generator[0]
        if isinstance(generator, list):
            return torch.cat([self._draw_labels(1, g).cpu() for g in generator])
        classes = torch.tensor(self.classes, device=generator.device if generator is not None else "cpu")
        return classes[torch.randint(len(classes), (batch_size,), generator=generator, device=classes.device)]

    def postprocess(self, latents: Tensor, output_type: str | None) -> Any:
        """From the model's range of values to images."""
        if output_type == "latent":
            return latents
        low, high = self.scheduler.config.image_range
        # For [-1, 1] this is `x / 2 + 0.5`, as everywhere in diffusers.
        image = (latents / (high - low) - low / (high - low)).clamp(0, 1)
        if output_type == "pil" and image.shape[1] not in (1, 3, 4):
            raise ValueError(f"An image of {image.shape[1]} channels has no PIL form: use `output_type='np'` or 'pt'.")
        if output_type == "pt":
            return image
        array = VaeImageProcessor.pt_to_numpy(image)
        return array if output_type == "np" else self.numpy_to_pil(array)

    def _check_inputs(
        self,
        batch_size: int,
        generator: Any,
        output_type: str | None,
        tensor_inputs: Sequence[str],
        guidance_scale: float,
    ) -> None:
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"`batch_size` must be a positive integer, got {batch_size!r}.")
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"`output_type` must be one of {', '.join(OUTPUT_TYPES)}, got {output_type!r}.")
        if isinstance(generator, list) and len(generator) != batch_size:
            raise ValueError(f"Got {len(generator)} generators for `batch_size={batch_size}`.")
        unknown = set(tensor_inputs) - set(self._callback_tensor_inputs)
        if unknown:
            raise ValueError(f"The callback can get {self._callback_tensor_inputs}, not {sorted(unknown)}.")
        if guidance_scale != 1 and None in (self.config.null_class_label, self.unet.config.num_class_embeds):
            raise ValueError(
                f"`guidance_scale={guidance_scale}` needs a student trained with a null class; this one has no "
                "`null_class_label`."
            )

    @property
    def num_timesteps(self) -> int:
        """Steps of the current or last call."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """Set `_interrupt` in a callback to stop sampling early."""
        return self._interrupt


def _in_precision(embedding: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """diffusers gives the embedding of a second time float32 whatever the precision of the network."""
    return (inputs[0].to(embedding.linear_1.weight.dtype),)
