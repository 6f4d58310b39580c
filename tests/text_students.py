"""Students that make images of text, as runs save them, but without a run; and a CLIP model that looks at images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image
from stable_diffusion import (
    IMAGE_SIZE,
    TEXT_WIDTH,
    TOKENS,
    VOCABULARY,
    make_sdxl,
    make_stable_diffusion,
    make_tokenizer,
)
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

from cm_diffusers import ConsistencyScheduler
from cm_diffusers.networks import GUIDANCE_CHANNELS
from cm_diffusers.training.lora import trained, with_adapters
from cm_diffusers.training.saving import save_student

CLIP_SIZE = 12
CAPTIONS = [f"cat {i}, left" for i in range(24)]


class Corners(nn.Module):
    """A feature network: four pixels of each channel."""

    def forward(self, images: Tensor) -> Tensor:
        return images[..., :2, :2].float().flatten(1)


def make_text_student(kind: str = "full", xl: bool = False, boundary: str = "lcm") -> Any:
    """A tiny latent consistency model of random weights.

    Args:
        kind (`str`): `"full"`, which is told its guidance scale; `"adapters"`; or `"untold"`.
        xl (`bool`): of SDXL.
        boundary (`str`): of its scheduler; no stock scheduler computes the others.
    """
    make = make_sdxl if xl else make_stable_diffusion
    pipe = make(time_cond_proj_dim=GUIDANCE_CHANNELS if kind == "full" else None)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        if kind == "adapters":
            pipe.register_modules(unet=with_adapters(pipe.unet, rank=2))
            for weight in trained(pipe.unet):
                torch.nn.init.normal_(weight, std=0.1)
        elif kind == "full":
            torch.nn.init.normal_(pipe.unet.time_embedding.cond_proj.weight, std=0.1)
    pipe.scheduler = ConsistencyScheduler.from_teacher(
        pipe.scheduler, boundary=boundary, clip_denoised=False, original_inference_steps=50
    )
    return pipe


def save_text_student(folder: Path, kind: str = "full", xl: bool = False, boundary: str = "lcm") -> Path:
    """The same in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    save_student(make_text_student(kind, xl, boundary), folder)
    return folder


def make_captioned() -> datasets.Dataset:
    """Pictures of noise, with a caption for each."""
    pixels = np.random.default_rng(0).integers(0, 256, (len(CAPTIONS), IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    rows = {"image": [Image.fromarray(image) for image in pixels], "text": CAPTIONS}
    return datasets.Dataset.from_dict(rows, features=features)


def save_clip(folder: Path, seed: int = 0) -> Path:
    """A tiny CLIP model of random weights that reads letters, with its tokenizer and image processor."""
    shape = {"intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "projection_dim": TEXT_WIDTH}
    text = {
        "vocab_size": len(VOCABULARY), "hidden_size": TEXT_WIDTH, "max_position_embeddings": TOKENS,
        "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1,
    }  # fmt: skip
    vision = {"hidden_size": TEXT_WIDTH, "image_size": CLIP_SIZE, "patch_size": 4}
    config = CLIPConfig(
        text_config={**shape, **text}, vision_config={**shape, **vision}, projection_dim=TEXT_WIDTH
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = CLIPModel(config)
        for weight in model.parameters():  # as they are made, all images are alike
            torch.nn.init.normal_(weight, std=0.3)
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    CLIPImageProcessor(
        size={"shortest_edge": CLIP_SIZE}, crop_size={"height": CLIP_SIZE, "width": CLIP_SIZE},
        image_mean=[0.4, 0.5, 0.6], image_std=[0.2, 0.25, 0.3],
    ).save_pretrained(folder)  # fmt: skip
    return folder
