"""What the benchmarks measure: a UNet, and its distillation with Heun's method and an EMA target."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DDPMScheduler, UNet2DModel

from cm_diffusers import ConsistencyConfig, ConsistencyTrainer


def make_network(size: int, channels: int, layers: int = 1) -> UNet2DModel:
    """A UNet of two levels, on images of three channels."""
    return UNet2DModel(
        sample_size=size,
        block_out_channels=(channels, channels),
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        layers_per_block=layers,
    )


def make_trainer(
    folder: str, batch_size: int = 64, size: int = 16, channels: int = 64, layers: int = 1, **changes: Any
) -> ConsistencyTrainer:
    """A trainer at its first step of distillation."""
    settings = {
        "distance": "pseudo_huber", "batch_size": batch_size, "conversion_steps": 0, "teacher_check": False,
        "output_dir": folder, "tracker": "none", "target": "ema", "mu": 0.95, "sample_steps": 0,
    }  # fmt: skip
    config = ConsistencyConfig.from_dict({**settings, **changes})
    images = torch.randn(8 * batch_size, 3, size, size, generator=torch.Generator().manual_seed(0))
    return ConsistencyTrainer(
        config, teacher=(make_network(size, channels, layers), DDPMScheduler()), train_dataset=images
    )
