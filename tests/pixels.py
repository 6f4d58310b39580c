"""Training on a few values, whose consistency function is known."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from closed_form import PointMixture
from torch import Tensor, nn

from cm_diffusers.solvers import heun_step
from cm_diffusers.training.randomness import SampleRandom

SIGMA_MIN, SIGMA_MAX = 0.02, 10.0


class PixelNetwork(nn.Module):
    """A UNet's calling convention on a few values: an MLP of them, the time and, if there is one, a second time.

    Args:
        dropout (`float`): its dropout.
        time_scale (`float`): what times are divided by.
        channels (`int`): how many values there are.
        width (`int`): of its layers.
    """

    def __init__(self, dropout: float = 0.0, time_scale: float = 1.0, channels: int = 1, width: int = 64) -> None:
        super().__init__()
        self.time_scale = time_scale
        self.layers = nn.Sequential(
            nn.Linear(channels + 16, width), nn.SiLU(), nn.Dropout(dropout), nn.Linear(width, width), nn.SiLU(),
            nn.Linear(width, channels),
        )  # fmt: skip

    def forward(self, sample: Tensor, timestep: Tensor, class_labels: Tensor | None = None, return_dict: bool = True):
        times = [timestep, timestep * 0 if class_labels is None else class_labels]
        waves = [time.view(-1, 1) / self.time_scale * torch.tensor([1.0, 2.0, 4.0, 8.0]).to(sample) for time in times]
        features = torch.cat([sample.flatten(1), *(f for wave in waves for f in (wave.sin(), wave.cos()))], 1)
        return (self.layers(features).view_as(sample),)


def mean_loss(objective: Any, images: Tensor, step: int = 0, seed: int = 0) -> Tensor:
    seeds = torch.arange(len(images)) + len(images) * (step + seed)
    return objective.losses(images, step, SampleRandom(seeds, images.device)).values.mean()


def train(objective_of: Callable[[nn.Module], Any], problem: Any, steps: int = 1000, batch: int = 256) -> nn.Module:
    """A network that has minimised `objective_of(network)` on a problem of `closed_form`."""
    torch.manual_seed(0)
    network = PixelNetwork()
    objective = objective_of(network)
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        loss = mean_loss(objective, problem.draw((batch, 1, 1, 1)), step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return network


def error(
    f: Callable, truth: Callable, problem: Any, levels: tuple[float, ...] = (0.3, 1.5, SIGMA_MAX), count: int = 2000
) -> float:
    """Root mean square error over `count` noisy samples at each level."""
    generator = torch.Generator().manual_seed(1)
    squares = []
    for sigma in levels:
        images = problem.draw(count if isinstance(problem, PointMixture) else (count, 1, 1, 1), generator)
        x = images + sigma * torch.randn(images.shape, generator=generator)
        with torch.no_grad():
            squares.append((f(x, sigma) - truth(x, sigma)).square().mean())
    return float(torch.stack(squares).mean().sqrt())


def ode_solution(problem: Any) -> Callable[[Tensor, float], Tensor]:
    """The consistency function, by following the ODE in 400 steps."""

    def truth(x: Tensor, sigma: float) -> Tensor:
        sigmas = sigma * (SIGMA_MIN / sigma) ** torch.linspace(0, 1, 400, dtype=torch.float64)
        state = x.double()
        for high, low in zip(sigmas[:-1], sigmas[1:], strict=True):
            state = heun_step(problem.denoise, state, high, low)
        return state.float()

    return truth
