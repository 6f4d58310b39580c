"""Tiny Stable Diffusion pipelines of random weights, of real classes: latents of 4 x 8 x 8, images of 3 x 16 x 16.

A prompt is spelled: each of its letters is a token, so that different prompts are different conditions.
"""

from __future__ import annotations

import json
import string
import tempfile
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

IMAGE_SIZE = 16
LATENT_SIZE = 8
TEXT_WIDTH = 8
TOKENS = 77

START, END = "<|startoftext|>", "<|endoftext|>"
LETTERS = string.ascii_lowercase + string.digits + string.punctuation
VOCABULARY = [START, END, *LETTERS, *(f"{letter}</w>" for letter in LETTERS)]


def make_stable_diffusion(
    prediction_type: str = "epsilon", time_cond_proj_dim: int | None = None, seed: int = 0
) -> StableDiffusionPipeline:
    """A Stable Diffusion pipeline under DDIM with Stable Diffusion's betas, without a safety checker.

    Args:
        prediction_type (`str`): `"epsilon"`, `"v_prediction"` or `"sample"`, in the scheduler's config.
        time_cond_proj_dim (`int`, *optional*): width of the embedding of a guidance scale, for latent consistency
            models that are told one.
        seed (`int`): of all weights.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        pipe = StableDiffusionPipeline(
            vae=_vae(), text_encoder=CLIPTextModel(_text_config()).eval(), tokenizer=make_tokenizer(),
            unet=_unet(TEXT_WIDTH, time_cond_proj_dim), scheduler=_scheduler(prediction_type),
            safety_checker=None, feature_extractor=None, requires_safety_checker=False,
        )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def make_sdxl(
    prediction_type: str = "epsilon", time_cond_proj_dim: int | None = None, seed: int = 0
) -> StableDiffusionXLPipeline:
    """A Stable Diffusion XL pipeline with both text encoders. Arguments as in [`make_stable_diffusion`]."""
    told = {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": TEXT_WIDTH + 6 * 8,  # the pooled text, and six numbers of sizes
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        pipe = StableDiffusionXLPipeline(
            vae=_vae(), unet=_unet(2 * TEXT_WIDTH, time_cond_proj_dim, **told),
            text_encoder=CLIPTextModel(_text_config()).eval(), tokenizer=make_tokenizer(),
            text_encoder_2=CLIPTextModelWithProjection(_text_config()).eval(), tokenizer_2=make_tokenizer(),
            scheduler=_scheduler(prediction_type), add_watermarker=False,
        )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def make_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer that knows letters, digits and punctuation, and merges none."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(VOCABULARY)}))
        (Path(folder) / "merges.txt").write_text("#version: 0.2\n")
        return CLIPTokenizer.from_pretrained(folder, model_max_length=TOKENS)


def _text_config() -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(VOCABULARY), hidden_size=TEXT_WIDTH, intermediate_size=16, projection_dim=TEXT_WIDTH,
        num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=TOKENS,
        bos_token_id=VOCABULARY.index(START), eos_token_id=VOCABULARY.index(END), pad_token_id=VOCABULARY.index(END),
    )  # fmt: skip


def _unet(cross_attention_dim: int, time_cond_proj_dim: int | None, **config: Any) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=LATENT_SIZE, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=cross_attention_dim, attention_head_dim=4, norm_num_groups=4,
        time_cond_proj_dim=time_cond_proj_dim, **config,
    ).eval()  # fmt: skip


def _vae() -> AutoencoderKL:
    return AutoencoderKL(
        sample_size=IMAGE_SIZE, block_out_channels=(4, 8), latent_channels=4, norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    ).eval()  # fmt: skip


def _scheduler(prediction_type: str) -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type=prediction_type,
        clip_sample=False, set_alpha_to_one=False, steps_offset=1,
    )  # fmt: skip
