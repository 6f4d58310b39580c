"""Walks between two images with consistency models."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import ImagePipelineOutput
from diffusers.utils import replace_example_docstring
from torch import Tensor
from typing_extensions import Unpack

from cm_diffusers.network_config import read_preconditioning
from cm_diffusers.noise_levels import karras_grid
from cm_diffusers.pipelines.editing import EditingPipeline, SamplingOptions
from cm_diffusers.pipelines.inputs import check_count
from cm_diffusers.preconditioning import CMPreconditioning, Denoiser
from cm_diffusers.schedulers import ConsistencyScheduler
from cm_diffusers.solvers import follow

EXAMPLE_DOC_STRING = """
    Examples:
        ```py
        >>> import torch
        >>> from cm_diffusers import ConsistencyInterpolationPipeline

        >>> pipe = ConsistencyInterpolationPipeline.from_pretrained("openai/diffusers-cd_bedroom256_lpips")
        >>> frames = pipe(num_frames=8, generator=torch.manual_seed(0)).images
        ```
"""


class ConsistencyInterpolationPipeline(EditingPipeline):
    r"""
    Images on the way from one sample to another (Song et al. 2023, section 6).

    The noises that two samples start from are interpolated on the sphere, and each point of the way becomes an image.
    Between two given images it leads from the noises that the teacher's probability-flow ODE ends at when it is
    followed upwards from them. Shares all components with [`ConsistencyPipeline`], see `from_pipe`.
    """

    @torch.no_grad()
    @replace_example_docstring(EXAMPLE_DOC_STRING)
    def __call__(  # type: ignore[override]
        self,
        image: Any = None,
        teacher: Any = None,
        num_frames: int = 8,
        num_inference_steps: int | None = 1,
        height: int | None = None,
        width: int | None = None,
        num_inversion_steps: int = 40,
        **options: Unpack[SamplingOptions],
    ) -> ImagePipelineOutput | tuple[Any, ...]:
        r"""
        Args:
            image (a list of two `PIL.Image.Image`, or two images as `np.ndarray` or `Tensor`, *optional*):
                The images to go from and to. Arrays have the shape `(2, height, width, channels)`, tensors
                `(2, channels, height, width)`, with values in [0, 1]. Resized to the model's size.
            teacher (pipeline, or `tuple` of a network and its scheduler, *optional*):
                The diffusion model that inverts `image`: the student's teacher, or one of the same data.
            num_frames (`int`, *optional*, defaults to 8):
                How many images there are on the way, its ends among them.
            num_inference_steps (`int`, *optional*, defaults to 1):
                The number of network evaluations of each. All frames have the same noise between their steps.
            height, width (`int`, *optional*):
                Size in pixels; the model's own when `None`.
            num_inversion_steps (`int`, *optional*, defaults to 40):
                Heun's steps, of two evaluations of the teacher each, of an inversion.
            options:
                `latents` (of shape `(2, channels, height, width)`, the noises to go from and to, drawn when `None`),
                `class_labels` (one for all), `timesteps`, `sigmas`, `guidance_scale`, `generator` (one),
                `output_type`, `return_dict`, `callback_on_step_end` and `callback_on_step_end_tensor_inputs`, as in
                [`ConsistencyPipeline`].

        Examples:

        Returns:
            [`ImagePipelineOutput`] or `tuple`: the images, in the order of the way.

        Raises:
            `ValueError`: for a number of frames below 2, images without a teacher, or inputs that the model cannot
            take.
        """
        check_count("num_frames", num_frames, 2)
        if (image is None) != (teacher is None):
            raise ValueError("`image` and `teacher` go together: it is the teacher that finds the images' noises.")
        options = self._edit_options(options) if image is not None else self._checked(options)
        generator, device, ends = options.get("generator"), self._execution_device, options.get("latents")
        if isinstance(generator, list):
            raise ValueError("All frames share their noise: pass one `generator`, not a list.")
        labels = self.prepare_class_labels(1, device, options.get("class_labels"), generator)
        if image is not None:
            if ends is not None:
                raise ValueError("Pass `image` or `latents`, not both.")
            images = self.preprocess(image, None, *self.image_size(height, width))
            _check_ends(images)
            ends = self.invert(images, teacher, num_inversion_steps, labels)
        elif ends is not None:
            _check_ends(ends)
        ends = self.prepare_noise(2, height, width, device, generator, ends)
        ends = ends.to(torch.promote_types(ends.dtype, torch.float32))
        options["latents"] = slerp(ends[:1], ends[1:], torch.linspace(0, 1, num_frames, device=device))
        options["class_labels"], options["generator"] = labels, _copies(generator, num_frames, device)
        return self._sample(num_frames, height, width, num_inference_steps=num_inference_steps, **options)

    @torch.no_grad()
    def invert(self, images: Tensor, teacher: Any, num_steps: int = 40, class_labels: Tensor | None = None) -> Tensor:
        """The noise that a diffusion model's samples would have started from, had they been these images.

        Its probability-flow ODE is followed upwards by Heun's method, from `sigma_min` of the student, or the lowest
        level that it knows, to `sigma_max`.

        Args:
            images (`Tensor` of shape `(batch, channels, height, width)`): in the model's range of values.
            teacher (pipeline, or `tuple` of a network and its scheduler): the diffusion model, on the same device.
            num_steps (`int`): of the solver.
            class_labels (`Tensor` of shape `(1,)`, *optional*): of the images; class-conditional teachers get it.

        Returns:
            `Tensor` of the shape of `images`: of about unit variance, as `latents` are.

        Raises:
            `ValueError`, `TypeError`: for a teacher that does not fit the student.
        """
        unet, scheduler = _network_and_scheduler(teacher)
        family, config, device = read_preconditioning(scheduler), self.scheduler.config, self._execution_device
        low, high = family.sigma_range
        if isinstance(scheduler, ConsistencyScheduler) or isinstance(family, CMPreconditioning):
            raise ValueError("A consistency model has no probability-flow ODE to follow: pass a diffusion model.")
        if config.sigma_max > high * (1 + 1e-6):
            raise ValueError(f"The student starts from noise of {config.sigma_max:g}; its teacher knows {high:g}.")
        image_range = getattr(family, "image_range", (-1.0, 1.0))
        if tuple(image_range) != tuple(config.image_range):
            raise ValueError(f"The teacher's images lie in {image_range}, and the student's in {config.image_range}.")
        if unet.device != device:
            raise ValueError(f"The teacher is on {unet.device}, and the pipeline on {device}.")
        labels: dict[str, Any] = {}
        if class_labels is not None and unet.config.num_class_embeds is not None:
            labels = {"class_labels": class_labels.expand(len(images))}
        points = check_count("num_inversion_steps", num_steps) + 1
        sigmas = karras_grid(points, max(low, config.sigma_min), config.sigma_max)
        was_training = unet.training
        unet.eval()  # dropout would make noise of its own
        try:
            found = follow(Denoiser(unet, family), images.to(device, torch.float32), sigmas, **labels)
        finally:
            unet.train(was_training)
        return found / config.sigma_max


def _network_and_scheduler(teacher: Any) -> tuple[Any, Any]:
    if isinstance(teacher, tuple | list) and len(teacher) == 2:
        return teacher[0], teacher[1]
    if hasattr(teacher, "unet") and hasattr(teacher, "scheduler"):
        return teacher.unet, teacher.scheduler
    raise TypeError(f"`teacher` must be a pipeline, or a network and its scheduler, got {type(teacher).__name__}.")


def _check_ends(ends: Tensor) -> None:
    if len(ends) != 2:
        raise ValueError(f"A way has two ends, got {len(ends)}.")


def slerp(one: Tensor, other: Tensor, share: Tensor) -> Tensor:
    """Spherical linear interpolation (Shoemake 1985).

    Args:
        one, other (`Tensor` of shape `(1, ...)`): the ends.
        share (`Tensor` of shape `(frames,)`): 0 at the first, 1 at the second.

    Returns:
        `Tensor` of shape `(frames, ...)`: of the length of the ends all the way, where these are of one.
    """
    a, b = one.float(), other.float()
    cosine = (a * b).sum() / (a.norm() * b.norm())
    share = share.float().view(-1, *[1] * (one.ndim - 1))
    angle = cosine.clamp(-1, 1).arccos()
    if not angle.sin() > 1e-3:  # no way is the shortest, or all are straight
        return torch.lerp(a, b, share).to(one.dtype)
    return (((1 - share) * angle).sin() * a + (share * angle).sin() * b).div(angle.sin()).to(one.dtype)


def _copies(generator: torch.Generator | None, count: int, device: torch.device) -> list[torch.Generator]:
    """Generators that all draw the same."""
    seed = int(torch.randint(2**62, (), generator=generator, device=None if generator is None else generator.device))
    kind = device if generator is None else generator.device
    return [torch.Generator(kind).manual_seed(seed) for _ in range(count)]
