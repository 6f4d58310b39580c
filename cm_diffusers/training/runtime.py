"""What a run stands on: a place to write to, accelerate, and an optimiser."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin, ProjectConfiguration
from torch import nn

from cm_diffusers.training.config import ConsistencyConfig


def check_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"`output_dir` {str(folder)!r} cannot be written to: {error}") from error


def make_accelerator(config: ConsistencyConfig) -> Accelerator:
    return Accelerator(
        mixed_precision=config.mixed_precision,
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            num_steps=config.gradient_accumulation_steps, sync_with_dataloader=False
        ),
        log_with=None if config.tracker == "none" else config.tracker,
        project_config=ProjectConfiguration(project_dir=config.output_dir, logging_dir=f"{config.output_dir}/logs"),
    )


def make_optimizer(config: ConsistencyConfig, unet: nn.Module) -> torch.optim.Optimizer:
    optimizer = {"radam": torch.optim.RAdam, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[config.optimizer]
    arguments: dict[str, Any] = {"foreach": True} if config.optimizer == "radam" else {"fused": True}
    betas = (config.adam_betas[0], config.adam_betas[1])
    return optimizer(
        unet.parameters(), lr=config.learning_rate, betas=betas, weight_decay=config.weight_decay, **arguments
    )
