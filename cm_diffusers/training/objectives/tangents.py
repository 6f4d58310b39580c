"""Consistency in continuous time: the limit of two noise levels that meet.

Along the probability-flow ODE the consistency function does not change. Instead of comparing it at two neighbouring
levels, its derivative along the ODE is driven to zero (Song et al. 2023, theorem 5; Lu & Song 2024). In the time
t = atan(sigma / sigma_data) of TrigFlow, sCM's derivative `cos(t) sin(t) df/dt` is `df / d ln(sigma)`, which says the
same of every family of networks, whatever its preconditioning, and stays bounded at both ends of the noise schedule.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.hooks import RemovableHandle

from cm_diffusers.networks import network_output
from cm_diffusers.preconditioning import Boundary, HasScalings, Preconditioning, Scalings, second_time
from cm_diffusers.solvers import Denoise, expand
from cm_diffusers.training.objectives import Losses
from cm_diffusers.training.objectives.pairs import chosen, has_dropout, same_dropout
from cm_diffusers.training.randomness import SampleRandom

NetworkDerivative = Callable[..., Tensor]


def forward_mode(
    network: Any, sample: Tensor, time: Tensor, sample_tangent: Tensor, time_tangent: Tensor, **conditioning: Any
) -> Tensor:
    """dF, the derivative of a network along a direction, by forward-mode automatic differentiation.

    Args:
        network (`Callable`): called like a diffusers UNet.
        sample, sample_tangent (`Tensor` of shape `(batch, channels, height, width)`): its input, and the direction.
        time, time_tangent (`Tensor` of shape `(batch,)`): its timestep, and the direction.
        conditioning: passed to the network; constant.
    """
    # Not torch.func.jvp: under it, dropout draws other masks where a tensor is not contiguous.
    # Of the kernels of attention, only the plain one has a forward derivative.
    with forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH), contiguous_norms(network):
        inputs = forward_ad.make_dual(sample, sample_tangent), forward_ad.make_dual(time, time_tangent)
        tangent: Tensor = forward_ad.unpack_dual(network_output(network, *inputs, **conditioning)).tangent
        return tangent


@contextmanager
def contiguous_norms(network: Any) -> Iterator[None]:
    """Group norms get contiguous inputs meanwhile: of others, torch 2.11 knows no forward derivative on CPUs."""
    hooks = make_norms_contiguous(network)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def make_norms_contiguous(network: Any) -> list[RemovableHandle]:
    """From now on, give group norms contiguous inputs. Returns what ends that."""
    modules = network.modules() if isinstance(network, nn.Module) else ()
    norms = [module for module in modules if isinstance(module, nn.GroupNorm)]
    return [norm.register_forward_pre_hook(_contiguous) for norm in norms]


def _contiguous(norm: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (inputs[0].contiguous(),)


def finite_difference(
    network: Any, sample: Tensor, time: Tensor, sample_tangent: Tensor, time_tangent: Tensor, **conditioning: Any
) -> Tensor:
    """The same by a central difference: for networks that forward mode cannot see through.

    The step balances the cut-off Taylor series against rounding: the cube root of the smallest number that counts,
    and less where time would move by more than that of its period, as embeddings of time oscillate with it.
    Products in TF32 would leave a tenth of the difference to rounding.
    """
    step = torch.finfo(torch.float32).eps ** (1 / 3) / (1 + time_tangent.abs() / 10)

    def predict(step: Tensor) -> Tensor:
        moved = (sample + expand(step, sample) * sample_tangent, time + step * time_tangent)
        return network_output(network, *moved, **conditioning)

    with without_tf32():
        with same_dropout(network, sample.device):
            after = predict(step)
        return (after - predict(-step)) / expand(2 * step, sample)


@contextmanager
def without_tf32() -> Iterator[None]:
    """Products of float32 as such, on GPUs too."""
    available: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.cudnn)
    backends = available if torch.cuda.is_available() else ()
    before = [backend.allow_tf32 for backend in backends]
    try:
        for backend in backends:
            backend.allow_tf32 = False
        yield
    finally:
        for backend, allowed in zip(backends, before, strict=True):
            backend.allow_tf32 = allowed


@contextmanager
def in_full_precision(network: Any, device: torch.device) -> Iterator[None]:
    """Half of it leaves nothing of a derivative. accelerate's own autocast is part of the network that it prepared."""
    plain = getattr(network, "_original_forward", None)
    wrapped = network.forward if plain is not None else None
    try:
        if plain is not None:
            network.forward = plain
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        if plain is not None:
            network.forward = wrapped


DERIVATIVES: dict[str, NetworkDerivative] = {"forward": forward_mode, "finite_difference": finite_difference}


class Jump(NamedTuple):
    """Where a batch jumps: from a noise level to one below, by the scalings of `f = c_skip * x + c_out * F`.

    `conditioning` is what the network is told of the lower level, if it has to be told.
    """

    sigma: Tensor
    function: HasScalings
    conditioning: dict[str, Tensor]


@dataclass(frozen=True)
class ConsistencyJumps:
    """All the way down to where the consistency function is the identity.

    Args:
        boundary (`HasScalings`): the scalings of f.
        sigmas (`Callable`): from positions, uniform on [0, 1), to noise levels of the same shape.
    """

    boundary: HasScalings
    sigmas: Callable[[Tensor], Tensor]

    def draw(self, random: SampleRandom) -> Jump:
        return Jump(self.sigmas(random.uniform()), self.boundary, {})


@dataclass(frozen=True)
class FlowMapJumps:
    """Down to any lower level, of which the network is told (Geng et al. 2025; Kim et al. 2024).

    The map is a step of the ODE, `f = (r / sigma) * x + (1 - r / sigma) * D`, along the average of D on the way from
    sigma to r. Where r is sigma there is no way, and D is the denoiser itself.

    Args:
        preconditioning ([`~cm_diffusers.preconditioning.Preconditioning`]): the student's, of D.
        sigma_min (`float`): the lowest level.
        sigmas (`Callable`): as in [`ConsistencyJumps`].
        instant (`float`): share of the batch where r is sigma.
        whole (`float`): share where r is `sigma_min`, as it is in one-step sampling. The others draw it as sigma.
    """

    preconditioning: Preconditioning
    sigma_min: float
    sigmas: Callable[[Tensor], Tensor]
    instant: float = 0.5
    whole: float = 0.25

    def draw(self, random: SampleRandom) -> Jump:
        one, other, kind = self.sigmas(random.uniform()), self.sigmas(random.uniform()), random.uniform()
        sigma, lower = torch.maximum(one, other), torch.minimum(one, other)
        lower = torch.where(kind < self.instant, sigma, lower)
        lower = torch.where(kind >= 1 - self.whole, self.sigma_min, lower)
        function = Boundary(self.preconditioning, "euler", lower)
        return Jump(sigma, function, second_time(self.preconditioning, lower, random.device))


@dataclass(frozen=True)
class NormalizedTangent:
    """`g / (|g| + c)` with c = 0.1, which no single sample can dominate (Lu & Song 2024, section 4.1).

    `|g|` is the norm over the sample. The result is multiplied by what makes its entries of order 1, however many.
    """

    constant: float = 0.1

    def __call__(self, tangent: Tensor) -> Tensor:
        norm = tangent.flatten(1).norm(dim=1)
        return tangent * expand(math.sqrt(tangent[0].numel()) / (norm + self.constant), tangent)


@dataclass(frozen=True)
class PowerNormalizedTangent:
    """`g / (|g|^2 + c)^p`: the adaptive weight of MeanFlow (Geng et al. 2025, section 4.3).

    `|g|^2` is the mean over the sample, not the sum: so `c` counts alike for images of every size.
    """

    power: float = 0.75
    constant: float = 1e-3

    def __call__(self, tangent: Tensor) -> Tensor:
        size = tangent.flatten(1).square().mean(1)
        return tangent / expand((size + self.constant) ** self.power, tangent)


@dataclass(frozen=True)
class WarmUp:
    """The share of the tangent's unstable part: from 0 to 1 in the first `steps` steps (Lu & Song 2024)."""

    steps: int

    def __call__(self, step: int) -> float:
        return min(1.0, step / self.steps) if self.steps else 1.0


@dataclass(frozen=True)
class TangentObjective:
    """`|F - F_ + g|^2`, whose gradient moves f against its derivative along the ODE (Lu & Song 2024, equation 8).

    `F_` is F without gradient, and g the derivative `df / d ln(sigma)` in units of the network's output, after
    `normalize`. Its stable part `cos(t)^2 * (D_student - D)`, which for a network of EDM's kind is the difference to
    the teacher's velocity, is there from the first step; the rest, with the network's own derivative, comes with the
    warm-up.

    Args:
        network (`nn.Module`): the student's, with gradient.
        plain (`nn.Module`): the same as it is outside of the wrapper of several processes, for its derivative.
        preconditioning ([`~cm_diffusers.preconditioning.Preconditioning`]): the student's, of D.
        jumps (`ConsistencyJumps` or `FlowMapJumps`): noise levels, and f.
        teacher (`Callable`, *optional*): D of the teacher; the clean images themselves when `None`.
        derivative (`Callable`): [`forward_mode`] or [`finite_difference`].
        normalize (`Callable`): of tangents.
        warm_up (`Callable[[int], float]`): share of the unstable part at a step.
        real_data (`float`): share of the samples that take the clean image for the teacher's D.
    """

    network: Any
    plain: Any
    preconditioning: Preconditioning
    jumps: Any
    teacher: Denoise | None
    derivative: NetworkDerivative
    normalize: Callable[[Tensor], Tensor]
    warm_up: Callable[[int], float]
    real_data: float = 0.0

    def __post_init__(self) -> None:
        if self.derivative is forward_mode and has_dropout(self.network):
            # Masks are drawn in the order of memory: in the pass with gradient, and where checkpoints of activations
            # repeat it, they have to be those of the derivative.
            make_norms_contiguous(self.plain)

    def losses(self, images: Tensor, step: int, random: SampleRandom, **conditioning: Any) -> Losses:
        jump = self.jumps.draw(random)
        sample = images + expand(jump.sigma, images) * random.normal_like(images)
        with torch.no_grad():
            clean = images if self.teacher is None else self.teacher(sample, jump.sigma, **conditioning)
        if self.real_data:
            clean = torch.where(chosen(random, self.real_data, images), images, clean)
        now, change = scalings_along(jump.function, jump.sigma, images)
        along = sample - clean  # dx / d ln(sigma), the ODE's direction
        told = {**conditioning, **jump.conditioning}

        scaled = sample / now.input_scale
        scaled_along = (along - scaled * change.input_scale) / now.input_scale
        times = now.c_noise.flatten(), change.c_noise.flatten()
        device = images.device
        with torch.no_grad(), same_dropout(self.network, device), in_full_precision(self.plain, device):
            output_change = self.derivative(self.plain, scaled, times[0], scaled_along, times[1], **told)
        output = network_output(self.network, scaled, times[0], **told).float()

        constant = output.detach()
        skip, out = (expand(s, images) for s in self.preconditioning.output_scalings(jump.sigma))
        total = change.c_skip * sample + now.c_skip * along + change.c_out * constant + now.c_out * output_change
        stable = expand(self._cos_squared(jump.sigma), images) * (skip * sample + out * constant - clean)
        tangent = (stable + self.warm_up(step) * (total - stable)) / out
        error = output - constant + self.normalize(tangent)
        # A flow map's clean image is the one that it moves along, wherever it jumps to.
        answer = (skip, out) if jump.conditioning else (now.c_skip, now.c_out)
        denoised = answer[0] * sample + answer[1] * output
        return Losses(error.square().flatten(1).mean(1), jump.sigma, denoised)

    def _cos_squared(self, sigma: Tensor) -> Tensor:
        """cos(t)^2 in TrigFlow's time."""
        variance = self.preconditioning.sigma_data**2
        return variance / (variance + sigma**2)


def scalings_along(function: HasScalings, sigma: Tensor, images: Tensor) -> tuple[Scalings, Scalings]:
    """The scalings of f at `sigma`, and their derivatives by ln(sigma), each ready to multiply `images`."""
    # In float64, and on the CPU as the noise levels are: the network alone is differentiated on the device.
    log_sigma = sigma.double().log()
    found = torch.func.jvp(lambda value: tuple(function.scalings(value.exp())), (log_sigma,), (log_sigma * 0 + 1,))
    now, change = (Scalings(*(expand(value, images) for value in values)) for values in found)
    return now, change
