"""Small networks that are trained beside the student: the estimate behind a learned weight, a discriminator."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from cm_diffusers.training.config import ConsistencyConfig
from cm_diffusers.training.objectives.adversarial import Discriminator, feature_channels
from cm_diffusers.training.objectives.weights import LogLoss
from cm_diffusers.training.teacher import Teacher

LOG_LOSS_RATE, DISCRIMINATOR_RATE = 1e-2, 1e-3


class Companion:
    """A network and its optimiser, whole on every process, whatever is done to the student.

    Its gradient comes with the student's, from one backward pass.

    Args:
        module (`nn.Module`): the network, the same on all processes.
        accelerator (`Accelerator`): the run's.
        learning_rate (`float`): of Adam.
    """

    def __init__(self, module: nn.Module, accelerator: Accelerator, learning_rate: float) -> None:
        self.module, self.accelerator = module.to(accelerator.device), accelerator
        weights = [weight for weight in module.parameters() if weight.requires_grad]
        self.optimizer = torch.optim.Adam(weights, lr=learning_rate, betas=(0.9, 0.99), fused=True)
        for weight in weights:  # from the start, as a checkpoint that finds nothing would take a step to make it
            self.optimizer.state[weight] = {
                "step": torch.zeros((), device=weight.device),
                "exp_avg": torch.zeros_like(weight),
                "exp_avg_sq": torch.zeros_like(weight),
            }
        self._weights = weights

    def step(self, bad: Tensor) -> None:
        """Take a step with the mean gradient of all processes, unless it or the student's is not finite.

        Args:
            bad (`Tensor` of shape `()`): whether the student's gradient is not finite, on the device.
        """
        gradients = [weight.grad for weight in self._weights if weight.grad is not None]
        if not gradients:
            return
        if self.accelerator.num_processes > 1:
            for gradient in gradients:
                gradient.copy_(self.accelerator.reduce(gradient, "mean"))
        optimizer: Any = self.optimizer
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.unscale_(optimizer)  # which also sees an overflow, for the next scale
        finite = torch.stack([gradient.isfinite().all() for gradient in gradients]).all()
        optimizer.found_inf = (bad | ~finite).float()
        optimizer.step()

    def zero_grad(self) -> None:
        """Forget the gradient."""
        self.optimizer.zero_grad()


def make_companions(
    config: ConsistencyConfig, teacher: Teacher | None, sigma_range: tuple[float, float], accelerator: Accelerator
) -> dict[str, Companion]:
    """What the run trains beside the student, by name.

    Raises:
        `ValueError`: if a discriminator has no teacher whose features it could see.
    """
    companions = {}
    if config.weighting == "adaptive":
        companions["log_loss"] = Companion(LogLoss(*sigma_range), accelerator, LOG_LOSS_RATE)
    if config.adversarial_weight:
        companions["discriminator"] = Companion(_discriminator(config, teacher), accelerator, DISCRIMINATOR_RATE)
    return companions


def _discriminator(config: ConsistencyConfig, teacher: Teacher | None) -> Discriminator:
    if teacher is None:
        raise ValueError("`adversarial_weight` needs a `teacher`, whose features the discriminator sees.")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)  # the same on all processes
        return Discriminator(feature_channels(teacher))
