"""The optimiser's step: fused, on the device, and left out where the gradient is not finite."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from cm_diffusers.training.config import ConsistencyConfig
from cm_diffusers.training.lora import trained

EPS = 1e-8
# Beside it a second moment is nothing, so that Adam's step becomes one along its momentum.
NO_ADAPTATION = 1e8


def make_optimizer(config: ConsistencyConfig, network: nn.Module) -> torch.optim.Optimizer:
    """Adam in one of its forms, fused. RAdam is, too, under [`set_learning_rate`], which sets every step's rate."""
    kind = torch.optim.AdamW if config.optimizer == "adamw" else torch.optim.Adam
    betas = (config.adam_betas[0], config.adam_betas[1])
    return kind(
        trained(network),
        betas=betas,
        eps=EPS,
        weight_decay=config.weight_decay,
        fused=True,
    )


def set_learning_rate(optimizer: Any, config: ConsistencyConfig, rate: float, step: int) -> None:
    """Set what the optimiser's step number `step`, counted from 0, depends on."""
    eps = EPS
    if config.optimizer == "radam":
        rate, eps = rectified(rate, config.adam_betas[1], step)
    for group in optimizer.param_groups:
        group["lr"], group["eps"] = rate, eps


def rectified(rate: float, beta2: float, step: int) -> tuple[float, float]:
    """Learning rate and epsilon with which Adam's step is RAdam's (Liu et al. 2019, algorithm 2).

    The rectification depends on the number of the step alone, so it is a schedule: `rate * r_t` once the variance of
    the second moment is tractable, and plain momentum before. Torch adds epsilon before the second moment's bias is
    corrected in RAdam, and afterwards in Adam.

    Args:
        rate (`float`): the learning rate.
        beta2 (`float`): the decay of the second moment.
        step (`int`): counted from 0.
    """
    t = step + 1
    correction = 1 - beta2**t
    longest = 2 / (1 - beta2) - 1
    length = longest - 2 * t * beta2**t / correction
    if length <= 5:
        return rate * NO_ADAPTATION, NO_ADAPTATION
    r = math.sqrt((length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length))
    return rate * r, EPS / math.sqrt(correction)


def take_step(optimizer: Any, bad: Tensor) -> None:
    """Step `optimizer`, unless `bad` is 1: then weights and moments stay as they are. The host does not wait for it.

    Args:
        optimizer (`AcceleratedOptimizer`): as accelerate prepared it. With a scaler it looks for itself, and so did
            DeepSpeed's, which has taken its step with the backward pass.
        bad (`Tensor` of shape `()`): whether the gradient is not finite, on the device.
    """
    if optimizer.scaler is None:
        optimizer.optimizer.found_inf = bad.float()
    optimizer.step()
