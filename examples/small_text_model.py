"""A small Stable Diffusion: images of Fashion-MNIST from captions, every part of it stock, and trained here."""

from __future__ import annotations

import json
import string
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from small_images import load_fashion_mnist
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from cm_diffusers.training.ema import EMA, decay_for_half_life
from cm_diffusers.training.schedules import Rate

SIZE, WIDTH, TOKENS = 16, 32, 16
KINDS = (
    "t-shirt", "pair of trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot"
)  # fmt: skip
PHRASES = ("a {}", "a photo of a {}", "a picture of a {}", "{}")


# Data ---------------------------------------------------------------------------------------------------------------


class CaptionedFashion(Dataset):
    """60,000 images of 16 x 16 pixels in [-1, 1], with captions: what they show, in one of four phrases."""

    def __init__(self, part: str = "train") -> None:
        self.images, self.labels = load_fashion_mnist(size=SIZE, part=part)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, row: int) -> dict[str, Tensor | str]:
        return {"image": self.images[row], "caption": caption(int(self.labels[row]), row)}


def caption(kind: int, row: int) -> str:
    """What is said of an image of a kind."""
    return PHRASES[row % len(PHRASES)].format(KINDS[kind])


# The model ----------------------------------------------------------------------------------------------------------


def make_pipeline(vae: AutoencoderKL, channels: tuple[int, int] = (32, 64)) -> StableDiffusionPipeline:
    """Stable Diffusion in small, untrained but for its VAE, whose latents are 4 x 8 x 8."""
    tokenizer = make_tokenizer([caption(kind, row) for kind in range(len(KINDS)) for row in range(len(PHRASES))])
    words = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_hidden_layers=1,
        num_attention_heads=4, max_position_embeddings=TOKENS, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=channels,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), norm_num_groups=8,
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), cross_attention_dim=WIDTH, attention_head_dim=4,
    )  # fmt: skip
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
        steps_offset=1,
    )  # fmt: skip
    return StableDiffusionPipeline(
        vae=vae, text_encoder=CLIPTextModel(words), tokenizer=tokenizer, unet=unet, scheduler=scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def make_tokenizer(texts: Sequence[str], max_length: int = TOKENS) -> CLIPTokenizer:
    """A CLIP tokenizer with the merges that some texts suggest."""
    start, end = "<|startoftext|>", "<|endoftext|>"
    letters = string.ascii_lowercase + string.digits + string.punctuation
    vocabulary = [start, end, *letters, *(f"{letter}</w>" for letter in letters)]
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocabulary)}))
        (Path(folder) / "merges.txt").write_text("#version: 0.2\n")
        letter_by_letter = CLIPTokenizer.from_pretrained(folder, model_max_length=max_length)
    return letter_by_letter.train_new_from_iterator([list(texts)], vocab_size=512, show_progress=False)


# Training -----------------------------------------------------------------------------------------------------------


def make_vae() -> AutoencoderKL:
    """Four numbers for each 2 x 2 pixels."""
    return AutoencoderKL(
        in_channels=1, out_channels=1, sample_size=SIZE, block_out_channels=(16, 32), latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=8,
        mid_block_add_attention=False,
    )  # fmt: skip


def train_vae(images: Tensor, steps: int, batch_size: int = 64) -> AutoencoderKL:
    """A VAE whose latents are of about unit variance once they are scaled."""
    vae = make_vae()
    optimizer, rate = torch.optim.Adam(vae.parameters(), fused=True), Rate(2e-3, steps, "cosine", warmup_steps=50)
    for step in tqdm(range(steps), desc="VAE"):
        clean = images[torch.randint(len(images), (batch_size,))]
        posterior = vae.encode(clean).latent_dist
        error = (vae.decode(posterior.sample()).sample - clean).square().mean()
        take_step(optimizer, rate(step), error + 1e-3 * posterior.kl().mean() / posterior.mean[0].numel())
    vae.eval().requires_grad_(False)
    vae.register_to_config(scaling_factor=1 / float(encode(vae, images[:2000]).sample().std()))
    return vae


@torch.no_grad()
def encode(vae: AutoencoderKL, images: Tensor):
    """The VAE's posterior of many images."""
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

    parts = [vae.encode(part).latent_dist.parameters for part in images.split(500)]
    return DiagonalGaussianDistribution(torch.cat(parts))


def train_model(pipe: StableDiffusionPipeline, data: CaptionedFashion, steps: int, batch_size: int = 64) -> None:
    """Train network and text encoder to predict epsilon, in place; a tenth of the captions are left empty."""
    posterior = encode(pipe.vae, data.images)
    tokens = pipe.tokenizer(
        [caption(kind, row) for kind in range(len(KINDS)) for row in range(len(PHRASES))] + [""],
        padding="max_length", max_length=TOKENS, return_tensors="pt",
    ).input_ids  # fmt: skip
    both = nn.ModuleList([pipe.unet, pipe.text_encoder]).train()
    average, optimizer = EMA(both), torch.optim.Adam(both.parameters(), betas=(0.9, 0.99), fused=True)
    rate = Rate(2e-3, steps, "cosine", warmup_steps=100)
    for step in tqdm(range(steps), desc="teacher"):
        rows = torch.randint(len(data), (batch_size,))
        told = data.labels[rows] * len(PHRASES) + rows % len(PHRASES)
        told = told.masked_fill(torch.rand(batch_size) < 0.1, len(tokens) - 1)
        latents = posterior.mean[rows] + posterior.std[rows] * torch.randn_like(posterior.mean[rows])
        latents = latents * pipe.vae.config.scaling_factor
        noise, timesteps = torch.randn_like(latents), torch.randint(1000, (batch_size,))
        words = pipe.text_encoder(tokens[told]).last_hidden_state
        predicted = pipe.unet(pipe.scheduler.add_noise(latents, noise, timesteps), timesteps, words).sample
        take_step(optimizer, rate(step), nn.functional.mse_loss(predicted, noise))
        average.update(both, decay_for_half_life(20_000, batch_size, (step + 1) * batch_size, 0.05))
    pipe.unet.load_state_dict(average.network[0].state_dict())
    pipe.text_encoder.load_state_dict(average.network[1].state_dict())
    both.eval().requires_grad_(False)


def take_step(optimizer: torch.optim.Optimizer, rate: float, loss: Tensor) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_([weight for group in optimizer.param_groups for weight in group["params"]], 1.0)
    optimizer.step()
