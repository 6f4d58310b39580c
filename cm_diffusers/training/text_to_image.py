"""What stands before the network of a latent text-to-image model: its text encoders and its VAE, both frozen."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from diffusers.utils import logging as diffusers_logging
from torch import Tensor, nn

from cm_diffusers.networks import copy_in, networks_of
from cm_diffusers.pipelines.text import network_latents, overflows_in_half
from cm_diffusers.training.randomness import SampleRandom

PIXELS_AT_ONCE = 2**20  # four pictures of 512 x 512, or one of 1024 x 1024
ENCODERS = ("text_encoder", "text_encoder_2", "vae")


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    """Stock pipelines print what does not fit into a prompt of 77 tokens: of many captions, at every step."""
    level = diffusers_logging.get_verbosity()
    diffusers_logging.set_verbosity_error()
    try:
        yield
    finally:
        diffusers_logging.set_verbosity(level)


class TextToImage:
    """Turns captions and pictures into what the network of a Stable Diffusion pipeline is told and shown.

    Args:
        pipeline (`StableDiffusionPipeline` or `StableDiffusionXLPipeline`): left as it is.

    Raises:
        `TypeError`: for any other pipeline.
        `ValueError`: for one that takes more than a text: a mask, or a score.
    """

    def __init__(self, pipeline: Any) -> None:
        from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

        if not isinstance(pipeline, StableDiffusionPipeline | StableDiffusionXLPipeline):
            raise TypeError(
                f"A text-to-image teacher must be a StableDiffusionPipeline or a StableDiffusionXLPipeline, got "
                f"{type(pipeline).__name__}."
            )
        config, latents = pipeline.unet.config, pipeline.vae.config.latent_channels
        if config.in_channels != latents:
            raise ValueError(f"The network takes {config.in_channels} channels, but its VAE's latents have {latents}.")
        if config.time_cond_proj_dim is not None:
            raise ValueError("A network that is told its guidance scale is a student already: it cannot be guided.")
        self.pipeline = pipeline
        self.is_xl = isinstance(pipeline, StableDiffusionXLPipeline)
        self._encoders = pipeline
        self._empty: dict[str, Tensor] = {}

    def prepare(self, device: torch.device, dtype: torch.dtype) -> None:
        """Put copies of the encoders where the run is. A VAE that half precision would overflow stays in float32."""
        wide = torch.float32 if overflows_in_half(self.pipeline) else dtype
        copies = _copies(_encoders_of(self.pipeline), device, dtype, vae_dtype=wide)
        self._encoders, self._empty = self._with(copies), {}
        for module in copies.values():
            module.eval().requires_grad_(False)

    def digests(self) -> dict[str, str]:
        """What tells the encoders of this pipeline from others, by their names: digests of their weights."""
        from cm_diffusers.evaluation.digests import network_digest

        return {name: network_digest(module) for name, module in _encoders_of(self.pipeline).items()}

    def forget_network(self, teacher: Any) -> None:
        """Hold the teacher's network as the run has it, and no longer the pipeline's own: that may be another copy."""
        self.pipeline = copy.copy(self.pipeline)
        self.pipeline.unet = teacher

    def ready(self, student: Any) -> Any:
        """A student's pipeline with copies of all other parts where its network is, and in its precision."""
        weight = student.unet.conv_in.weight
        others = {name: part for name, part in networks_of(self.pipeline).items() if name != "unet"}
        copies = _copies(others, weight.device, weight.dtype, vae_dtype=weight.dtype)
        return self._with({"unet": student.unet, "scheduler": student.scheduler, **copies})

    @property
    def modules(self) -> list[nn.Module]:
        """The encoders that are where the run is."""
        return list(_encoders_of(self._encoders).values())

    @property
    def image_channels(self) -> int:
        """Of the pictures that the VAE takes."""
        return int(self.pipeline.vae.config.in_channels)

    @property
    def shrinks_by(self) -> int:
        """How many pixels of a picture, in each direction, are one of its latents."""
        return int(self.pipeline.vae_scale_factor)

    @torch.no_grad()
    def posterior(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the VAE's latents of pictures.

        Large pictures are encoded in parts: a VAE takes more memory for one than the network does.

        Args:
            images (`Tensor` of shape `(batch, channels, height, width)`): in [-1, 1].

        Returns:
            two `Tensor`s of shape `(batch, latent channels, height / factor, width / factor)`: in float32.
        """
        vae, at_once = self._encoders.vae, max(1, PIXELS_AT_ONCE // images[0, 0].numel())
        with torch.autocast(images.device.type, enabled=False):
            found = [vae.encode(part.to(vae.dtype)).latent_dist for part in images.split(at_once)]
        return torch.cat([one.mean for one in found]).float(), torch.cat([one.std for one in found]).float()

    def scale(self, mean: Tensor, std: Tensor, random: SampleRandom) -> Tensor:
        """Latents as the network knows them, drawn from their posterior."""
        return network_latents(self.pipeline.vae.config, mean + std * random.normal_like(mean))

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """What the text encoders say.

        Returns:
            `dict`: `prompt_embeds` of shape `(batch, tokens, channels)`, and for SDXL `pooled_prompt_embeds` of shape
            `(batch, channels)`.
        """
        encoders = self._encoders
        device = encoders.vae.device
        with torch.autocast(device.type, enabled=False), _without_warnings():
            found = encoders.encode_prompt(
                prompt=list(prompts), device=device, num_images_per_prompt=1, do_classifier_free_guidance=False
            )
        return {"prompt_embeds": found[0]} | ({"pooled_prompt_embeds": found[2]} if self.is_xl else {})

    def conditioning(self, embeddings: Mapping[str, Tensor], sizes: Tensor, target: tuple[int, int]) -> dict[str, Any]:
        """What the network is told.

        Args:
            embeddings (`dict[str, Tensor]`): of `encode_prompts`.
            sizes (`Tensor` of shape `(batch, 4)`): height and width of the original picture, and where it was cropped.
            target (`tuple[int, int]`): height and width of what was cropped.
        """
        hidden = embeddings["prompt_embeds"]
        told: dict[str, Any] = {"encoder_hidden_states": hidden}
        if self.is_xl:
            ends = torch.tensor(target, device=hidden.device).expand(len(hidden), 2)
            ids = torch.cat([sizes.to(hidden.device), ends], dim=1).float()
            told["added_cond_kwargs"] = {"text_embeds": embeddings["pooled_prompt_embeds"], "time_ids": ids}
        return told

    def empty(self) -> dict[str, Tensor]:
        """The embeddings of a prompt that says nothing, as the pipeline takes it for guidance; batches of one."""
        if not self._empty:
            self._empty = self.encode_prompts([""])
            if self.is_xl and self.pipeline.config.force_zeros_for_empty_prompt:
                self._empty = {name: torch.zeros_like(value) for name, value in self._empty.items()}
        return self._empty

    def without_text(self, conditioning: Mapping[str, Any]) -> dict[str, Any]:
        """The same conditioning, with a prompt that says nothing."""
        empty, hidden = self.empty(), conditioning["encoder_hidden_states"]
        told = {**conditioning, "encoder_hidden_states": empty["prompt_embeds"].to(hidden).expand_as(hidden)}
        if "added_cond_kwargs" in conditioning:
            added = conditioning["added_cond_kwargs"]
            pooled = empty["pooled_prompt_embeds"].to(added["text_embeds"]).expand_as(added["text_embeds"])
            told["added_cond_kwargs"] = {**added, "text_embeds": pooled}
        return told

    def with_network(self, unet: Any, scheduler: Any) -> Any:
        """The same pipeline with another network and scheduler."""
        return self._with({"unet": unet, "scheduler": scheduler})

    def on_device(self, student: Any) -> Any:
        """A student's pipeline with the encoders that are where the run is."""
        placed = _encoders_of(self._encoders)
        moved = self._with({"unet": student.unet, "scheduler": student.scheduler, **placed})
        moved.set_progress_bar_config(disable=True)
        return moved

    def _with(self, parts: Mapping[str, Any]) -> Any:
        """The same pipeline with other parts."""
        config, components = self.pipeline.config, self.pipeline.components
        flags = {name: value for name, value in config.items() if name[0] != "_" and name not in components}
        return type(self.pipeline)(**{**components, **parts}, **flags)


def _encoders_of(pipeline: Any) -> dict[str, nn.Module]:
    """The encoders that a pipeline has, by name."""
    return {name: module for name in ENCODERS if (module := getattr(pipeline, name, None)) is not None}


def _copies(
    modules: Mapping[str, nn.Module], device: torch.device, dtype: torch.dtype, vae_dtype: torch.dtype
) -> dict[str, nn.Module]:
    """Copies of a pipeline's parts, moved as modules of torch, as diffusers' own way warns of what it moves."""
    return {
        name: nn.Module.to(copy_in(module, vae_dtype if name == "vae" else dtype), device)
        for name, module in modules.items()
    }
