"""From a batch of the dataset to what the networks are shown and told."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from cm_diffusers.networks import send
from cm_diffusers.training.randomness import SampleRandom
from cm_diffusers.training.text_to_image import TextToImage

Batch = Mapping[str, Any]
# What `TextToImage.encode_prompts` may give.
EMBEDDINGS = ("prompt_embeds", "pooled_prompt_embeds")


class Inputs(Protocol):
    """How a batch is read. Both of its methods take one on the device."""

    def __call__(self, batch: Batch, random: SampleRandom) -> tuple[Tensor, dict[str, Any]]:
        """Clean images as the network knows them, and its conditioning, for a training step."""

    def of_teacher(self, batch: Batch, random: SampleRandom) -> tuple[Tensor, dict[str, Any]]:
        """The same as a teacher takes it: nothing is left out, and there is no guidance scale."""


@dataclass(frozen=True)
class PixelInputs:
    """The images themselves, and their classes.

    Args:
        is_class_conditional (`bool`): whether the network is told classes.
        dropout (`float`): share of the labels that are replaced.
        null_class_label (`int`, *optional*): by this.
    """

    is_class_conditional: bool
    dropout: float = 0.0
    null_class_label: int | None = None

    def __call__(self, batch: Batch, random: SampleRandom) -> tuple[Tensor, dict[str, Any]]:
        images, conditioning = self.of_teacher(batch, random)
        if conditioning and self.dropout:
            labels = conditioning["class_labels"]
            dropped = send(random.uniform() < self.dropout, labels.device)
            conditioning["class_labels"] = labels.masked_fill(dropped, self.null_class_label or 0)
        return images, conditioning

    def of_teacher(self, batch: Batch, random: SampleRandom) -> tuple[Tensor, dict[str, Any]]:
        labels = batch.get("class_labels")
        return batch["images"], {"class_labels": labels} if self.is_class_conditional and labels is not None else {}


@dataclass(frozen=True)
class TextInputs:
    """Latents of the images, and the embeddings of their captions.

    Args:
        text ([`~cm_diffusers.training.text_to_image.TextToImage`]): the encoders.
        dropout (`float`): share of the captions that are left empty.
        guidance_range (`tuple[float, float]`, *optional*): from where each sample's guidance scale is drawn, for
            students that are told it.
    """

    text: TextToImage
    dropout: float = 0.0
    guidance_range: tuple[float, float] | None = None

    def __call__(self, batch: Batch, random: SampleRandom) -> tuple[Tensor, dict[str, Any]]:
        batch = self._embedded(batch)
        if self.dropout:
            batch = _without_captions(self.text, batch, random.uniform() < self.dropout)
        latents, conditioning = self._read(batch, random)
        return latents, conditioning | _draw_guidance(self.guidance_range, random, latents.device)

    def of_teacher(self, batch: Batch, random: SampleRandom) -> tuple[Tensor, dict[str, Any]]:
        return self._read(self._embedded(batch), random)

    def _read(self, batch: Batch, random: SampleRandom) -> tuple[Tensor, dict[str, Any]]:
        mean, std = self._posterior(batch)
        height, width = (length * self.text.shrinks_by for length in mean.shape[-2:])
        return self.text.scale(mean, std, random), self.text.conditioning(batch, batch["sizes"], (height, width))

    def _embedded(self, batch: Batch) -> Batch:
        """The batch with the embeddings of its captions."""
        return {**batch, **self.text.encode_prompts(batch["captions"])}

    def _posterior(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of its latents."""
        return self.text.posterior(batch["images"])


class CachedInputs(TextInputs):
    """The same of what a cache holds of pictures and captions, with the same random numbers as those of pictures."""

    def _embedded(self, batch: Batch) -> Batch:
        return {**batch, **{name: batch[name].float() for name in EMBEDDINGS if name in batch}}

    def _posterior(self, batch: Batch) -> tuple[Tensor, Tensor]:
        return batch["latent_mean"].float(), batch["latent_std"].float()


def _without_captions(text: TextToImage, batch: Batch, dropped: Tensor) -> Batch:
    """The batch with what stands for no caption, for those that are `dropped`, of shape `(batch,)`."""
    dropped = send(dropped, batch["prompt_embeds"].device)
    replaced = {
        name: torch.where(dropped.view(-1, *[1] * (empty.ndim - 1)), empty.to(batch[name]), batch[name])
        for name, empty in text.empty().items()
    }
    return {**batch, **replaced}


def _draw_guidance(
    interval: tuple[float, float] | None, random: SampleRandom, device: torch.device
) -> dict[str, Tensor]:
    """Each sample's guidance scale, from where it is drawn; nothing without that."""
    if interval is None:
        return {}
    low, high = interval
    scale = torch.lerp(torch.tensor(low).double(), torch.tensor(high).double(), random.uniform())
    return {"guidance_scale": send(scale.float(), device)}
