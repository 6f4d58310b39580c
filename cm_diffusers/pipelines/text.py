"""Text-to-image pipelines of stock diffusers, as students and their teachers are drawn from."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from cm_diffusers.networks import send

TOLD_GUIDANCE_SCALE = 8.5  # as diffusers' LatentConsistencyModelPipeline has it
# Parts of which drawing knows nothing: the first are asked before it, and the others not at all.
ASIDE = ("text_encoder", "text_encoder_2", "image_encoder", "safety_checker")
EMBEDDINGS = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")


def takes_prompts(pipeline: Any) -> bool:
    """Whether a pipeline makes images of text."""
    return hasattr(pipeline, "text_encoder")


def is_told_guidance(pipeline: Any) -> bool:
    """Whether its network is told the guidance scale, instead of being asked twice."""
    return pipeline.unet.config.time_cond_proj_dim is not None


def overflows_in_half(pipeline: Any) -> bool:
    """Whether its VAE needs float32: SDXL's may. All VAEs say so by default, and stock pipelines ask SDXL's alone."""
    return hasattr(pipeline, "text_encoder_2") and bool(pipeline.vae.config.force_upcast)


def resolve_guidance(pipeline: Any, guidance_scale: float | None) -> float:
    """The guidance scale that was asked for; otherwise that of [`told_guidance`] for a network that is told it.

    For others it is 1, which is off. What is told without a record of its training, published models for instance,
    is 8.5.

    Raises:
        `ValueError`: if it is below 1, which stock pipelines take for 1.
    """
    if guidance_scale is None:
        return getattr(pipeline, "told_guidance_scale", TOLD_GUIDANCE_SCALE) if is_told_guidance(pipeline) else 1.0
    if not guidance_scale >= 1:
        raise ValueError(f"`guidance_scale` must be at least 1 (off) for images of text, got {guidance_scale}.")
    return float(guidance_scale)


def told_guidance(choices: Mapping[str, Any]) -> float:
    """The scale that a network is told unless another is asked for: the middle of those that it was trained on.

    Args:
        choices (`Mapping`): fields of its run's config; 8.5 without `w_min` and `w_max`.
    """
    low, high = choices.get("w_min"), choices.get("w_max")
    return TOLD_GUIDANCE_SCALE if low is None or high is None else 1 + (low + high) / 2


def asks_twice(pipeline: Any, guidance_scale: float) -> bool:
    """Whether the network is evaluated with the prompt and without it, so that each step counts double."""
    return guidance_scale > 1 and not is_told_guidance(pipeline)


def prompts_in_turn(prompts: Sequence[str], seeds: Sequence[int]) -> list[str]:
    """The prompt of each image: that of seed i is prompt i mod n."""
    return [prompts[seed % len(prompts)] for seed in seeds]


@torch.no_grad()
def draw_prompts(
    pipeline: Any, prompts: Sequence[str], num_inference_steps: int, guidance_scale: float,
    generator: Sequence[torch.Generator],
) -> Tensor:  # fmt: skip
    """The images that a pipeline makes of prompts, without its safety checker and its watermark.

    Each depends on its prompt and its generator alone. The pipeline's parts may differ in precision, as those of a
    run do: each computes in its own.

    Args:
        pipeline (`StableDiffusionPipeline` or `StableDiffusionXLPipeline`): under any scheduler; left as it is.
        prompts (`Sequence[str]`): one for each image.
        guidance_scale (`float`): as the pipeline takes it.
        generator (`Sequence[torch.Generator]`): one for each image.

    Returns:
        `Tensor` of shape `(batch, channels, height, width)`: in [0, 1].
    """
    weight = pipeline.unet.conv_in.weight
    embeddings = pipeline.encode_prompt(
        prompt=list(prompts), device=weight.device, num_images_per_prompt=1,
        do_classifier_free_guidance=asks_twice(pipeline, guidance_scale),
    )  # fmt: skip
    given = zip(EMBEDDINGS, embeddings, strict=False)
    told = {name: value.to(weight.dtype) for name, value in given if value is not None}
    # Stock pipelines go by the precision of a text encoder that is there, and by the device of any part.
    network = copy.copy(pipeline)
    for name in ASIDE:
        if hasattr(pipeline, name):
            setattr(network, name, None)
    latents = network(
        **told, num_inference_steps=num_inference_steps, guidance_scale=guidance_scale, generator=list(generator),
        output_type="latent",
    ).images  # fmt: skip
    return _decode(pipeline, latents)


def _decode(pipeline: Any, latents: Tensor) -> Tensor:
    """The pictures of latents, decoded one by one: a VAE takes more memory than the network did."""
    vae, config = pipeline.vae, pipeline.vae.config
    if vae.dtype == torch.float16 and overflows_in_half(pipeline):
        vae = copy.deepcopy(vae).float()
    latents = vae_latents(config, latents.to(vae.dtype))
    pictures = torch.cat([vae.decode(one, return_dict=False)[0] for one in latents.split(1)])
    images: Tensor = pipeline.image_processor.postprocess(pictures.float(), output_type="pt")
    return images


def network_latents(config: Any, latents: Tensor) -> Tensor:
    """Latents of a VAE as networks know them: centred, and about of variance 1.

    Args:
        config: the VAE's.
        latents (`Tensor` of shape `(batch, channels, height, width)`): as it encodes pictures.
    """
    centre, spread = _latent_statistics(config, latents)
    return (latents - centre) * config.scaling_factor / spread


def vae_latents(config: Any, latents: Tensor) -> Tensor:
    """The inverse of [`network_latents`]: what the VAE decodes."""
    centre, spread = _latent_statistics(config, latents)
    return latents * spread / config.scaling_factor + centre


def _latent_statistics(config: Any, latents: Tensor) -> tuple[Tensor | float, Tensor | float]:
    """Mean and deviation: of each channel, where a VAE knows them, or of all together."""
    mean, std = (getattr(config, name, None) for name in ("latents_mean", "latents_std"))
    if mean is None or std is None:
        return getattr(config, "shift_factor", None) or 0.0, 1.0
    both = (torch.tensor(values, dtype=latents.dtype).view(1, -1, 1, 1) for values in (mean, std))
    centre, spread = (send(values, latents.device) for values in both)
    return centre, spread
