"""Small images, and small ordinary diffusion models of them: what the examples that run on a CPU have in common."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import torch
from diffusers import DDPMScheduler, UNet2DModel
from torch import Tensor, nn
from tqdm import tqdm

from cm_diffusers.training.ema import EMA, decay_for_half_life
from cm_diffusers.training.schedules import Rate
from cm_diffusers.training.teacher import Teacher

FASHION_MNIST = "/usr/share/datasets/fashion-mnist"  # where Debian's package puts it
EMOJI = "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"  # and that of fonts-noto-color-emoji


def load_digits() -> tuple[Tensor, Tensor]:
    """1,797 handwritten digits of 8 x 8 pixels in [-1, 1], and which digit each is."""
    from sklearn.datasets import load_digits as load

    digits = load()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1
    return images, torch.tensor(digits.target)


def load_fashion_mnist(
    folder: str | Path = FASHION_MNIST, size: int = 28, part: str = "train"
) -> tuple[Tensor, Tensor]:
    """The images of Fashion-MNIST (Xiao et al. 2017) in [-1, 1], and which of ten kinds each is.

    Args:
        folder (`str` or `Path`): holds `train-images-idx3-ubyte` and `train-labels-idx1-ubyte`, compressed or not.
        part (`str`): `"train"`, 60,000 images, or `"t10k"`, 10,000 others.
        size (`int`): 28; or 16, the average of every 2 x 2 pixels after a black frame has made them 32 x 32.

    Raises:
        `ValueError`: if the files are not there, saying where to get them, or are of another kind; for another size.
    """
    if size not in (16, 28):
        raise ValueError(f"`size` must be 16 or 28, got {size}.")
    pixels = torch.from_numpy(read_idx(Path(folder) / f"{part}-images-idx3-ubyte"))[:, None].float()
    labels = torch.from_numpy(read_idx(Path(folder) / f"{part}-labels-idx1-ubyte")).long()
    if size == 16:
        pixels = nn.functional.avg_pool2d(nn.functional.pad(pixels, (2, 2, 2, 2)), 2)
    return pixels / 127.5 - 1, labels


def load_emoji(font: str | Path = EMOJI, size: int = 16) -> Tensor:
    """1,400 emoji on white, in [-1, 1], of shape `(n, 3, size, size)`.

    Those of Noto Color Emoji (Google, SIL Open Font License 1.1) that are one character.

    Args:
        font (`str` or `Path`): its file with bitmaps.
        size (`int`): in pixels, averaged from 136.

    Raises:
        `ValueError`: if the file is not there, saying where to get it.
    """
    from fontTools.ttLib import TTFont
    from PIL import Image, ImageDraw, ImageFont

    if not Path(font).exists():
        raise ValueError(f"There is no {font}. Install Debian's package fonts-noto-color-emoji, or name its file.")
    characters = [chr(code) for code in sorted(TTFont(font).getBestCmap()) if code >= 0x2190]
    strike = ImageFont.truetype(str(font), 109)  # the size of its bitmaps
    found = []
    for character in characters:
        canvas = Image.new("RGB", (136, 136), "white")
        ImageDraw.Draw(canvas).text((68, 68), character, font=strike, embedded_color=True, anchor="mm")
        pixels = np.asarray(canvas.resize((size, size), Image.Resampling.BOX))
        if pixels.std() > 5:  # not those that only join others
            found.append(torch.from_numpy(pixels.copy()).permute(2, 0, 1))
    return torch.stack(found).float() / 127.5 - 1


def read_idx(path: Path) -> np.ndarray:
    """The bytes of an IDX file in their shape: of `path.gz` if it is there, else of `path`.

    Raises:
        `ValueError`: if neither is there, or it holds something else.
    """
    packed = path.with_name(f"{path.name}.gz")
    try:
        data = gzip.decompress(packed.read_bytes()) if packed.exists() else path.read_bytes()
    except FileNotFoundError as error:
        raise ValueError(
            f"There is no {path.name} in {path.parent}. Install Debian's package dataset-fashion-mnist, or download "
            "it with torchvision.datasets.FashionMNIST(root, download=True) and name the folder root/FashionMNIST/raw."
        ) from error
    except (OSError, EOFError) as error:
        raise ValueError(f"{packed} cannot be read: {error}") from error
    header = 4 + 4 * data[3] if data[:3] == b"\0\0\x08" and len(data) > 3 else 0  # 8 is the code of bytes
    shape = np.frombuffer(data[4:header], ">u4").tolist() if len(data) >= header > 0 else []
    if not shape or len(data) - header != np.prod(shape):
        raise ValueError(f"{path} is no IDX file of bytes, or is cut off.")
    return np.frombuffer(data, np.uint8, offset=header).reshape(shape).copy()


def make_unet(size: int, channels: tuple[int, ...], image_channels: int = 1) -> UNet2DModel:
    """A UNet of stock diffusers on square images; each further number of channels is a level of half the size."""
    return UNet2DModel(
        sample_size=size,
        in_channels=image_channels,
        out_channels=image_channels,
        layers_per_block=1,
        block_out_channels=channels,
        down_block_types=("DownBlock2D",) * len(channels),
        up_block_types=("UpBlock2D",) * len(channels),
        add_attention=False,
        norm_num_groups=8,
    )


def train_teacher(
    unet: UNet2DModel, images: Tensor, steps: int, batch_size: int = 128, learning_rate: float = 2e-3
) -> Teacher:
    """Train an ordinary diffusers model, a UNet and `DDPMScheduler`, to predict epsilon. Its weights are averages.

    The only random numbers are torch's global ones. The network stays on the device where it is.
    """
    scheduler, average = DDPMScheduler(), EMA(unet)
    optimizer = torch.optim.Adam(unet.parameters(), lr=learning_rate, betas=(0.9, 0.99), fused=True)
    rate = Rate(learning_rate, steps, "cosine", warmup_steps=100)
    for step in tqdm(range(steps), desc="teacher"):
        for group in optimizer.param_groups:
            group["lr"] = rate(step)
        clean = images[torch.randint(len(images), (batch_size,))].to(unet.device)
        noise, timesteps = torch.randn_like(clean), torch.randint(1000, (batch_size,)).to(unet.device)
        predicted = unet(scheduler.add_noise(clean, noise, timesteps), timesteps).sample
        loss = nn.functional.mse_loss(predicted, noise)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        average.update(unet, decay_for_half_life(20_000, batch_size, (step + 1) * batch_size, 0.05))
    return Teacher(average.network, scheduler, "a small diffusion model")
