"""Every diffusers model as a denoiser in sigma space.

All states are variance exploding, `x = x0 + sigma * n` with `n ~ N(0, I)`, whatever the network was trained with. A
pretrained network F becomes a denoiser through four scalar functions of sigma (Karras et al. 2022, equation 7):

    D(x; sigma) = c_skip(sigma) * x + c_out(sigma) * F(c_in(sigma) * x, c_noise(sigma))        ~ E[x0 | x]

and a consistency function through a boundary form on top of it, for which `f(x, sigma_min) = x` exactly (Song et al.
2023, equation 5; the published latent models, in unit variance). Schedulers, solvers, losses and export all take these
numbers from here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from cm_diffusers.networks import network_output, send

BOUNDARIES = ("edm", "euler", "lcm")

# An EDM network with this factor on its time has a consistency network's.
STOCK_TIME_SCALE = 1000.0

# What stands for the last alpha_bar of zero-terminal-SNR schedules: it is 0, where sigma is infinite. diffusers' Euler
# scheduler uses the same number; where the one before is smaller yet, a quarter of that doubles its sigma.
SMALLEST_ALPHA_BAR = 2.0**-24


class Scalings(NamedTuple):
    """What turns a network into a denoiser, at one or many noise levels.

    `input_scale` is `1 / c_in`: every family divides the state by a simple expression, and dividing is what stock
    schedulers do, bit for bit.
    """

    c_skip: Tensor
    c_out: Tensor
    input_scale: Tensor
    c_noise: Tensor


class HasScalings(Protocol):
    """Anything that gives the scalings at a noise level: a family (for D) or a boundary form (for f)."""

    def scalings(self, sigma: Tensor) -> Scalings: ...


def _double(value: Tensor) -> Tensor:
    """`value` in float64, or float32 on devices that have no float64."""
    return value.to(torch.float32 if value.device.type == "mps" else torch.float64)


def _without_zero(alpha_bar: Tensor) -> Tensor:
    """alpha_bar that ends in 0, with what stands for that."""
    if 0 < alpha_bar[-2] <= SMALLEST_ALPHA_BAR:
        return torch.cat([alpha_bar[:-1], alpha_bar[-2:-1] / 4])
    return alpha_bar.clamp(min=SMALLEST_ALPHA_BAR)


class Preconditioning:
    """One family of pretrained networks: its four functions of sigma, and the range in which they hold.

    Attributes:
        sigma_range (`tuple[float, float]`): the noise levels the network was trained on.
        image_range (`tuple[float, float]`): the values between which its training images lie.
        sigma_data (`float`): the standard deviation of the data, for the `edm` and `lcm` boundary forms.
        time_scale (`float`): factor on the network's time, where that is not the family's own.
    """

    sigma_range: tuple[float, float]
    image_range: tuple[float, float] = (-1.0, 1.0)
    sigma_data: float = 0.5
    time_scale: float = 1.0

    def input_scale(self, sigma: Tensor) -> Tensor:
        """`1 / c_in`, which the state is divided by before the network sees it."""
        raise NotImplementedError

    def output_scalings(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """`(c_skip, c_out)`."""
        raise NotImplementedError

    def c_noise(self, sigma: Tensor) -> Tensor:
        """The timestep that the network is given at `sigma`, in float64."""
        raise NotImplementedError

    def sigma_from_c_noise(self, timestep: Tensor) -> Tensor:
        """The inverse of `c_noise`, in float64."""
        raise NotImplementedError

    def scalings(self, sigma: Tensor) -> Scalings:
        c_skip, c_out = self.output_scalings(sigma)
        return Scalings(c_skip, c_out, self.input_scale(sigma), self.c_noise(sigma).to(torch.float32))

    @property
    def denoising(self) -> Preconditioning:
        """The family by which the network is a denoiser: itself, but for consistency networks, whose D is f."""
        return self


@dataclass(frozen=True)
class VPPreconditioning(Preconditioning):
    """Variance-preserving networks with discrete betas (DDPM, Stable Diffusion, ...).

    Args:
        alphas_cumprod (`Tensor` of shape `(num_train_timesteps,)`): alpha_bar of every training timestep.
        prediction_type (`str`): `"epsilon"`, `"v_prediction"` or `"sample"`.
        sigma_data, time_scale (`float`): see [`Preconditioning`].
    """

    alphas_cumprod: Tensor = field(repr=False)
    prediction_type: str = "epsilon"
    sigma_data: float = 0.5
    time_scale: float = 1.0

    @functools.cached_property
    def log_sigmas(self) -> Tensor:
        """ln sigma(t) for t = 0 ... num_train_timesteps - 1, with sigma(t) = sqrt((1 - alpha_bar) / alpha_bar)."""
        alpha_bar = self.alphas_cumprod.to("cpu", torch.float64)
        if alpha_bar[-1] <= 0:
            alpha_bar = _without_zero(alpha_bar)
        return ((1 - alpha_bar) / alpha_bar).log() / 2

    @functools.cached_property
    def _slopes(self) -> Tensor:
        """dt / d ln sigma from each timestep to the next."""
        return 1 / self.log_sigmas.diff()

    @property
    def sigma_range(self) -> tuple[float, float]:  # type: ignore[override]
        return float(self.log_sigmas[0].exp()), float(self.log_sigmas[-1].exp())

    def input_scale(self, sigma: Tensor) -> Tensor:
        return (sigma**2 + 1) ** 0.5

    def output_scalings(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        if self.prediction_type == "epsilon":
            return torch.ones_like(sigma), -sigma
        if self.prediction_type == "v_prediction":
            return 1 / (sigma**2 + 1), -sigma / (sigma**2 + 1) ** 0.5
        return torch.zeros_like(sigma), torch.ones_like(sigma)

    def c_noise(self, sigma: Tensor) -> Tensor:
        """t(sigma), the fractional timestep, by linear interpolation in ln sigma, times `time_scale`."""
        log_sigma = _double(sigma).log()
        table, slopes = self.log_sigmas.to(log_sigma), self._slopes.to(log_sigma)
        lower = torch.searchsorted(table[1:-1], log_sigma)
        weight = (log_sigma - table[lower]) * slopes[lower]
        return self.time_scale * (lower + weight.clamp(0, 1))

    def sigma_from_c_noise(self, timestep: Tensor) -> Tensor:
        timestep = (_double(timestep) / self.time_scale).clamp(0, len(self.alphas_cumprod) - 1)
        table = self.log_sigmas.to(timestep)
        lower = timestep.long().clamp(max=len(table) - 2)
        return torch.lerp(table[lower], table[lower + 1], timestep - lower).exp()


@dataclass(frozen=True)
class EDMPreconditioning(Preconditioning):
    """EDM networks (Karras et al. 2022, table 1).

    `sign` is -1 for networks that predict the negative of F; `time_scale` is a factor on their time `ln(sigma) / 4`.
    """

    sigma_range: tuple[float, float] = (0.002, 80.0)
    sigma_data: float = 0.5
    sign: float = 1.0
    time_scale: float = 1.0

    def input_scale(self, sigma: Tensor) -> Tensor:
        return (sigma**2 + self.sigma_data**2) ** 0.5

    def output_scalings(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        c_skip = self.sigma_data**2 / (sigma**2 + self.sigma_data**2)
        return c_skip, self.sign * sigma * self.sigma_data / (sigma**2 + self.sigma_data**2) ** 0.5

    def c_noise(self, sigma: Tensor) -> Tensor:
        return self.time_scale / 4 * _double(sigma).log()

    def sigma_from_c_noise(self, timestep: Tensor) -> Tensor:
        return (4 / self.time_scale * _double(timestep)).exp()


@dataclass(frozen=True)
class CMPreconditioning(Preconditioning):
    """Published consistency models, as diffusers runs them: D is f itself (Song et al. 2023, appendix C)."""

    sigma_range: tuple[float, float] = (0.002, 80.0)
    sigma_data: float = 0.5

    def input_scale(self, sigma: Tensor) -> Tensor:
        return (sigma**2 + self.sigma_data**2) ** 0.5

    def output_scalings(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        return edm_boundary_scalings(sigma, self.sigma_range[0], self.sigma_data)

    def c_noise(self, sigma: Tensor) -> Tensor:
        return 250 * _double(sigma).log()

    def sigma_from_c_noise(self, timestep: Tensor) -> Tensor:
        return (_double(timestep) / 250).exp()

    @property
    def denoising(self) -> Preconditioning:
        return EDMPreconditioning(self.sigma_range, self.sigma_data, time_scale=STOCK_TIME_SCALE)


@dataclass(frozen=True)
class FlowPreconditioning(Preconditioning):
    """Flow matching: the network sees `(1 - s) * x0 + s * n` at `s = sigma / (1 + sigma)` and predicts `n - x0`.

    Its last time s = 1 is sigma = infinity; the range ends, as diffusers' smallest step does, one step before.
    """

    num_train_timesteps: int = 1000
    sigma_data: float = 0.5
    time_scale: float = 1.0

    @property
    def sigma_range(self) -> tuple[float, float]:  # type: ignore[override]
        return 1 / (self.num_train_timesteps - 1), float(self.num_train_timesteps - 1)

    def input_scale(self, sigma: Tensor) -> Tensor:
        return 1 + sigma

    def output_scalings(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        return 1 / (1 + sigma), -sigma / (1 + sigma)

    def c_noise(self, sigma: Tensor) -> Tensor:
        sigma = _double(sigma)
        return self.time_scale * self.num_train_timesteps * sigma / (1 + sigma)

    def sigma_from_c_noise(self, timestep: Tensor) -> Tensor:
        time = _double(timestep) / (self.time_scale * self.num_train_timesteps)
        return time / (1 - time).clamp(min=1e-12)


@dataclass(frozen=True)
class VEPreconditioning(Preconditioning):
    """Variance-exploding score networks (NCSN++, Song et al. 2021), on images in [0, 1]."""

    sigma_range: tuple[float, float] = (0.01, 1348.0)
    image_range: tuple[float, float] = (0.0, 1.0)
    sigma_data: float = 0.5

    def input_scale(self, sigma: Tensor) -> Tensor:
        return torch.ones_like(sigma)

    def output_scalings(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ones_like(sigma), sigma**2

    def c_noise(self, sigma: Tensor) -> Tensor:
        return _double(sigma)

    def sigma_from_c_noise(self, timestep: Tensor) -> Tensor:
        return _double(timestep)


def edm_boundary_scalings(sigma: Tensor, sigma_min: float | Tensor, sigma_data: float) -> tuple[Tensor, Tensor]:
    """`(c_skip, c_out)` of the consistency function on EDM's F (Song et al. 2023, appendix C)."""
    # Not `sigma_data**2 / (... + sigma_data**2)`, which may miss 1 at sigma_min by a rounding error.
    c_skip = 1 / (1 + ((sigma - sigma_min) / sigma_data) ** 2)
    c_out = (sigma - sigma_min) * sigma_data / (sigma**2 + sigma_data**2) ** 0.5
    return c_skip, c_out


@dataclass(frozen=True)
class Boundary:
    """The consistency function of a family of networks: `f = c_skip * x + c_out * F`, the identity at `sigma_min`.

    All forms are `a(sigma) * x + b(sigma) * D(x; sigma)`:

    - `edm`: the paper's `c_skip, c_out` on EDM's F, which for EDM networks is the network itself;
    - `euler`: the exact Euler step of the PF-ODE to `sigma_min`, `a = sigma_min / sigma`, `b = 1 - a`;
    - `lcm`: that of latent consistency models (Luo et al. 2023), as diffusers' `LCMScheduler` has it, for
      variance-preserving networks: `c_skip(t) * z + c_out(t) * D` with `z = x / sqrt(1 + sigma^2)`, the state of unit
      variance, and t in timesteps from `sigma_min` on. It is the identity of z, not of x, and counts as clean.

    Args:
        preconditioning ([`Preconditioning`]): the family of the network.
        form (`str`): `"edm"`, `"euler"` or `"lcm"`.
        sigma_min (`float`, or `Tensor` of shape `(batch,)`): where f is the identity. That of `LCMScheduler` is the
            level of timestep 0.
        timestep_scaling (`float`): sharpness of the `lcm` form.
    """

    preconditioning: Preconditioning
    form: str
    sigma_min: float | Tensor
    timestep_scaling: float = 10.0

    def __post_init__(self) -> None:
        family = type(self.preconditioning)
        if self.form not in BOUNDARIES:
            raise ValueError(f"`boundary` must be one of {', '.join(BOUNDARIES)}, got {self.form!r}.")
        if self.form == "lcm" and (family is not VPPreconditioning or self.preconditioning.time_scale != 1):
            raise ValueError(
                "`boundary='lcm'` is defined on discrete timesteps: it needs a variance-preserving network with their "
                "time, which those of continuous levels do not have."
            )
        if self.form != "edm" and family is CMPreconditioning:
            raise ValueError(f"A consistency network is f itself: its `boundary` must be 'edm', got {self.form!r}.")

    @property
    def answer_level(self) -> float | Tensor:
        """The level of what f answers: noise that leads back to a higher one is added to that."""
        return 0.0 if self.form == "lcm" else self.sigma_min

    def scalings(self, sigma: Tensor) -> Scalings:
        base, time = self.preconditioning, self.preconditioning.c_noise(sigma)
        if self.form == "edm" and isinstance(base, CMPreconditioning | EDMPreconditioning):
            c_skip, c_out = edm_boundary_scalings(sigma, self.sigma_min, base.sigma_data)
            c_out = getattr(base, "sign", 1.0) * c_out
        else:
            a, b = self._mixture(sigma, time)
            c_skip, c_out = base.output_scalings(sigma)
            c_skip, c_out = a + b * c_skip, b * c_out
        return Scalings(c_skip, c_out, base.input_scale(sigma), time.to(torch.float32))

    def _mixture(self, sigma: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
        """`(a, b)` with `f = a * x + b * D`."""
        base, sigma_data = self.preconditioning, self.preconditioning.sigma_data
        # A tensor: torch divides a number by a tensor through its reciprocal, and x * (1 / x) may not be 1.
        lowest = torch.as_tensor(self.sigma_min, dtype=sigma.dtype, device=sigma.device)
        if self.form == "lcm":
            time = ((time - base.c_noise(lowest)) * self.timestep_scaling).to(sigma.dtype)
            a = 1 / (1 + (time / sigma_data) ** 2) / base.input_scale(sigma)
            return a, time / (time**2 + sigma_data**2) ** 0.5
        b = (sigma - self.sigma_min) / sigma
        if self.form == "euler":
            return lowest / sigma, b
        c_skip, _ = edm_boundary_scalings(sigma, self.sigma_min, sigma_data)
        return c_skip - b * sigma_data**2 / (sigma**2 + sigma_data**2), b


def second_time(preconditioning: HasScalings, sigma_lower: Tensor, device: torch.device) -> dict[str, Tensor]:
    """What the network of a flow map is told of the level, of shape `(batch,)`, that it jumps to."""
    return {"class_labels": send(preconditioning.scalings(sigma_lower).c_noise, device)}


class Denoiser:
    """D or f: a network together with its scalings.

    Args:
        network (`Callable`): a diffusers UNet, or anything called like one.
        preconditioning (`HasScalings`): a [`Preconditioning`] for D, a [`Boundary`] for f.
    """

    def __init__(self, network: Callable[..., Any], preconditioning: HasScalings) -> None:
        self.network = network
        self.preconditioning = preconditioning

    def __call__(self, sample: Tensor, sigma: Tensor | float, **conditioning: Any) -> Tensor:
        """
        Args:
            sample (`Tensor` of shape `(batch, channels, height, width)`): `x0 + sigma * n`.
            sigma (`float` or `Tensor` of shape `(batch,)` or `()`): noise level, on any device.
            conditioning: passed to the network, for instance `class_labels`.

        Returns:
            `Tensor` of the shape of `sample`, in float32 (float64 for a float64 sample).
        """
        dtype = torch.promote_types(sample.dtype, torch.float32)
        sigma = torch.as_tensor(sigma, dtype=dtype).expand(len(sample))
        scalings = Scalings(*(send(s, sample.device) for s in self.preconditioning.scalings(sigma)))
        c_skip, c_out, input_scale = (s.view(-1, *[1] * (sample.ndim - 1)) for s in scalings[:3])
        network_dtype = getattr(self.network, "dtype", dtype)
        scaled = (sample.to(dtype) / input_scale).to(network_dtype)
        output = network_output(self.network, scaled, scalings.c_noise, **conditioning)
        return c_skip * sample + c_out * output.to(dtype)
