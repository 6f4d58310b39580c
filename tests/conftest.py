"""Tiny networks, small enough that a test takes milliseconds."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # for networks this small, more threads wait for each other
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")  # what is compared to the bit is the CPU's, but for test_gpu.py

import torch
from diffusers import UNet2DModel


def build_unet(seed: int = 0, **config: Any) -> UNet2DModel:
    """A UNet2DModel of some thousand random parameters on 3 x 8 x 8 images, in eval mode."""
    config = {
        "sample_size": 8,
        "in_channels": 3,
        "out_channels": 3,
        "layers_per_block": 1,
        "block_out_channels": (8,),
        "down_block_types": ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",),
        "norm_num_groups": 4,
        "attention_head_dim": 4,
        **config,
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return UNet2DModel(**config).eval()


@pytest.fixture
def make_unet() -> Callable[..., UNet2DModel]:
    """`make_unet(seed=0, **config)`: a tiny UNet2DModel."""
    return build_unet


@pytest.fixture
def unet() -> UNet2DModel:
    """An unconditional UNet on 3 x 8 x 8 images."""
    return build_unet()


@pytest.fixture
def class_unet() -> UNet2DModel:
    """A class-conditional UNet with five classes, on 3 x 8 x 8 images."""
    return build_unet(num_class_embeds=5)


@pytest.fixture
def generator() -> torch.Generator:
    """A CPU generator in a known state."""
    return torch.Generator().manual_seed(0)
