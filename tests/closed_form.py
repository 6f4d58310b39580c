"""Problems whose denoiser is known in closed form, and the ideal networks of every family on them.

With data `x0 ~ p` and `x = x0 + sigma * n`, a network is called like a diffusers UNet,
`network(sample, timestep, return_dict=False)[0]`, and answers what its family defines it to predict. It recovers
`(x, sigma)` from nothing but its two arguments, so a wrong input scale or timestep shows as a wrong answer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


def per_sample(value: Tensor | float, like: Tensor) -> Tensor:
    """A scalar or a vector of one value per sample, shaped to be multiplied with `like`."""
    value = torch.as_tensor(value, device=like.device).to(like.dtype)
    return value if value.ndim == 0 else value.view(-1, *[1] * (like.ndim - 1))


@dataclass(frozen=True)
class Gaussian:
    """Independent values `x0 ~ N(mean, std^2)`."""

    mean: float = 0.3
    std: float = 0.6

    def draw(self, shape: tuple[int, ...], generator: torch.Generator | None = None, **factory: Any) -> Tensor:
        return self.mean + self.std * torch.randn(shape, generator=generator, **factory)

    def denoise(self, x: Tensor, sigma: Tensor | float) -> Tensor:
        """E[x0 | x]."""
        variance = per_sample(sigma, x) ** 2
        return self.mean + self.std**2 / (self.std**2 + variance) * (x - self.mean)

    def consistency(self, x: Tensor, sigma: Tensor | float, sigma_min: float) -> Tensor:
        """Where the PF-ODE through `(x, sigma)` passes `sigma_min`: x - mean scales like the marginal's width."""
        variance = per_sample(sigma, x) ** 2
        return self.mean + (x - self.mean) * ((self.std**2 + sigma_min**2) / (self.std**2 + variance)) ** 0.5


@dataclass(frozen=True)
class Mixture:
    """Independent values, each `N(means[k], std^2)` with probability `weights[k]`."""

    means: tuple[float, float] = (-0.7, 0.5)
    std: float = 0.2
    weights: tuple[float, float] = (0.4, 0.6)

    def draw(self, shape: tuple[int, ...], generator: torch.Generator | None = None, **factory: Any) -> Tensor:
        first = torch.rand(shape, generator=generator, **factory) < self.weights[0]
        return torch.where(first, *self.means) + self.std * torch.randn(shape, generator=generator, **factory)

    def denoise(self, x: Tensor, sigma: Tensor | float) -> Tensor:
        """E[x0 | x]: the components' own answers, weighted by how likely each made x."""
        variance = per_sample(sigma, x) ** 2
        total = self.std**2 + variance
        log_likelihood = torch.stack(
            [np.log(w) - (x - m) ** 2 / (2 * total) for m, w in zip(self.means, self.weights, strict=True)]
        )
        answers = torch.stack([(self.std**2 * x + variance * m) / total for m in self.means])
        return (log_likelihood.softmax(0) * answers).sum(0)


@dataclass(frozen=True)
class PointMixture:
    """Points or images, each one of `means` with the same probability, with `N(0, std^2)` added to every value.

    Args:
        means (`Tensor` of shape `(components, channels, height, width)`): what the components look like.
        std (`float`): how far points lie from them.
    """

    means: Tensor
    std: float = 0.2

    def draw(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        which = torch.randint(len(self.means), (count,), generator=generator)
        return self.means[which] + self.std * torch.randn(count, *self.means.shape[1:], generator=generator)

    def denoise(self, x: Tensor, sigma: Tensor | float, **conditioning: Any) -> Tensor:
        """E[x0 | x]: the components' own answers, weighted by how likely each made x."""
        variance = per_sample(sigma, x) ** 2
        total = self.std**2 + variance
        means = self.means.to(x)
        distances = (x[:, None] - means).flatten(2).square().sum(2)
        weights = (-distances / (2 * total.flatten()[:, None])).softmax(1)
        mean = torch.einsum("bk,kchw->bchw", weights, means)
        return (self.std**2 * x + variance * mean) / total


Denoise = Callable[[Tensor, Tensor], Tensor]


class IdealNetwork:
    """A network that is right: `predict(sample, timestep)` in the dress of a diffusers UNet."""

    dtype = torch.float64

    def __init__(self, predict: Callable[[Tensor, Tensor], Tensor]) -> None:
        self.predict = predict

    def __call__(self, sample: Tensor, timestep: Tensor, return_dict: bool = True, **conditioning: Any) -> Any:
        time = per_sample(timestep, sample)
        return (self.predict(sample.double(), time.double()),)

    def to(self, *args: Any) -> IdealNetwork:
        return self


def vp_network(denoise: Denoise, alphas_cumprod: Tensor, prediction_type: str) -> IdealNetwork:
    """Variance preserving: sees `alpha x0 + sigma n` with `alpha^2 = alpha_bar(t)`, predicts n, `alpha n - sigma x0`
    or x0. Between two timesteps, `ln((1 - alpha_bar) / alpha_bar)` is linear."""
    alpha_bar = alphas_cumprod.double().numpy()
    logits = np.log1p(-alpha_bar) - np.log(alpha_bar)

    def predict(sample: Tensor, t: Tensor) -> Tensor:
        logit = torch.from_numpy(np.interp(t.numpy(), np.arange(len(logits)), logits))
        alpha, noise_scale = torch.sigmoid(-logit) ** 0.5, torch.sigmoid(logit) ** 0.5
        x0 = denoise(sample / alpha, (noise_scale / alpha).flatten())
        noise = (sample - alpha * x0) / noise_scale
        return {"epsilon": noise, "v_prediction": alpha * noise - noise_scale * x0, "sample": x0}[prediction_type]

    return IdealNetwork(predict)


def edm_network(denoise: Denoise, sigma_data: float = 0.5, sign: float = 1.0) -> IdealNetwork:
    """EDM: unit-variance input, time `ln(sigma) / 4`, and the F for which the training target has unit variance."""

    def predict(sample: Tensor, time: Tensor) -> Tensor:
        sigma = torch.exp(4 * time)
        x = sample * (sigma**2 + sigma_data**2).sqrt()
        skip = sigma_data**2 / (sigma**2 + sigma_data**2)
        out = sign * sigma * sigma_data / (sigma**2 + sigma_data**2).sqrt()
        return (denoise(x, sigma.flatten()) - skip * x) / out

    return IdealNetwork(predict)


def consistency_network(consistency: Denoise, sigma_min: float = 0.002, sigma_data: float = 0.5) -> IdealNetwork:
    """Consistency model: unit-variance input, time `1000 ln(sigma) / 4`, and the F that makes f the given function."""

    def predict(sample: Tensor, time: Tensor) -> Tensor:
        sigma = torch.exp(time / 250)
        x = sample * (sigma**2 + sigma_data**2).sqrt()
        skip = sigma_data**2 / ((sigma - sigma_min) ** 2 + sigma_data**2)
        out = sigma_data * (sigma - sigma_min) / (sigma**2 + sigma_data**2).sqrt()
        return (consistency(x, sigma.flatten()) - skip * x) / out

    return IdealNetwork(predict)


def flow_network(denoise: Denoise, num_train_timesteps: int = 1000) -> IdealNetwork:
    """Flow matching: sees `(1 - s) x0 + s n` at time `1000 s`, predicts the velocity `n - x0`."""

    def predict(sample: Tensor, time: Tensor) -> Tensor:
        s = time / num_train_timesteps
        x0 = denoise(sample / (1 - s), (s / (1 - s)).flatten())
        noise = (sample - (1 - s) * x0) / s
        return noise - x0

    return IdealNetwork(predict)


def ve_network(denoise: Denoise) -> IdealNetwork:
    """Variance exploding: sees x at time sigma, predicts the score, by Tweedie's formula `(E[x0|x] - x) / sigma^2`."""

    def predict(sample: Tensor, sigma: Tensor) -> Tensor:
        return (denoise(sample, sigma.flatten()) - sample) / sigma**2

    return IdealNetwork(predict)
