"""How well images show what they were made of, as CLIP sees it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from cm_diffusers.evaluation.digests import network_digest
from cm_diffusers.training.record import public_name

BATCH_SIZE = 64


@dataclass(frozen=True)
class ClipScore:
    """CLIP's judgement of images and the texts that they were made of.

    Args:
        model (`CLIPModel`): of transformers.
        tokenizer, image_processor: its own, of transformers. The processor's config says how images are resized,
            cropped and normalised.
        name (`str`): names the model.
    """

    model: nn.Module
    tokenizer: Any
    image_processor: Any
    name: str

    @cached_property
    def digest(self) -> str:
        """Of the weights, and of how images are prepared."""
        return network_digest(self.model, self.image_processor.to_json_string())

    @torch.no_grad()
    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """`100 max(cos, 0)` of the embeddings of each image and its prompt (Hessel et al. 2021, section 3).

        Their scale is 2.5. Ours is that of torchmetrics, which only differs in that it clips the mean at 0, and not
        each score.

        Args:
            images (`Tensor` of shape `(n, 3 or 1, height, width)`): in uint8; grey ones become RGB.
            prompts (`Sequence[str]`): one for each. What is longer than the model reads is cut off.

        Returns:
            `Tensor` of shape `(n,)`: in [0, 100], in float32, on the model's device.

        Raises:
            `TypeError`: for images that are not uint8.
            `ValueError`: for another number of prompts.
        """
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3):
            raise TypeError(
                f"Images must be (n, 3 or 1, height, width) in uint8, got {tuple(images.shape)} in {images.dtype}."
            )
        if len(prompts) != len(images):
            raise ValueError(f"`prompts` must be one for each of the {len(images)} images, got {len(prompts)}.")
        parts = range(0, len(images), BATCH_SIZE)
        found = [self._score(images[i : i + BATCH_SIZE], list(prompts[i : i + BATCH_SIZE])) for i in parts]
        return torch.cat(found)

    def _score(self, images: Tensor, prompts: list[str]) -> Tensor:
        model: Any = self.model
        most = model.config.text_config.max_position_embeddings
        tokens = self.tokenizer(prompts, padding=True, truncation=True, max_length=most, return_tensors="pt")
        # Processors of some versions work on NumPy, and know RGB alone.
        pictures = list(images.expand(-1, 3, -1, -1).cpu())
        pixels = self.image_processor(images=pictures, return_tensors="pt")["pixel_values"]
        found = model(
            input_ids=tokens["input_ids"].to(model.device), attention_mask=tokens["attention_mask"].to(model.device),
            pixel_values=pixels.to(model.device),
        )  # fmt: skip
        cosines = torch.cosine_similarity(found.image_embeds.float(), found.text_embeds.float())
        return 100 * cosines.clamp(min=0)


def load_clip(path: str | Path, device: torch.device | str = "cpu") -> ClipScore:
    """A CLIP model with its tokenizer and its image processor.

    Args:
        path (`str` or `Path`): folder or Hub id, such as `openai/clip-vit-base-patch16`, with weights in safetensors.
        device (`torch.device` or `str`): where it computes.

    Raises:
        `ValueError`: if there is none.
    """
    from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer

    failed = f"There is no CLIP model with weights in safetensors at {str(path)!r}"
    try:
        model, report = CLIPModel.from_pretrained(path, use_safetensors=True, output_loading_info=True)
        tokenizer, image_processor = (kind.from_pretrained(path) for kind in (CLIPTokenizer, CLIPImageProcessor))
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(f"{failed}: {error}") from error
    if missing := sorted(report["missing_keys"]):  # which would be random numbers
        raise ValueError(f"{failed}: {len(missing)} weights are missing, {missing[0]} for one.")
    model = model.float().to(device).eval().requires_grad_(False)
    return ClipScore(model, tokenizer, image_processor, public_name(str(path)) or "CLIP")
