"""Consistency between two neighbouring noise levels: distillation and training in isolation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from cm_diffusers.networks import send
from cm_diffusers.noise_levels import LevelPair, Levels
from cm_diffusers.preconditioning import Denoiser
from cm_diffusers.solvers import Denoise, Solver, expand
from cm_diffusers.training.distances import Distance
from cm_diffusers.training.objectives import Losses
from cm_diffusers.training.randomness import SampleRandom

Weighting = Callable[[LevelPair], Tensor]


def uniform(pair: LevelPair) -> Tensor:
    """1 for every pair (Song et al. 2023)."""
    return torch.ones_like(pair.sigma)


def inverse_gap(pair: LevelPair) -> Tensor:
    """`1 / (sigma - sigma_lower)` (Song & Dhariwal 2023, section 3.1)."""
    return 1 / (pair.sigma - pair.sigma_lower)


WEIGHTINGS: dict[str, Weighting] = {"uniform": uniform, "inverse_gap": inverse_gap}


class Source(Protocol):
    """How the point at the lower level of a pair is found."""

    def __call__(
        self, images: Tensor, noise: Tensor, sample: Tensor, pair: LevelPair, random: SampleRandom, **conditioning: Any
    ) -> Tensor: ...


def from_data(
    images: Tensor, noise: Tensor, sample: Tensor, pair: LevelPair, random: SampleRandom, **conditioning: Any
) -> Tensor:
    """The same image with the same noise, at the lower level (algorithm 3)."""
    return images + expand(pair.sigma_lower, images) * noise


@dataclass(frozen=True)
class FromTeacher:
    """One step of the teacher's probability-flow ODE (algorithm 2)."""

    denoise: Denoise
    solver: Solver

    def __call__(
        self, images: Tensor, noise: Tensor, sample: Tensor, pair: LevelPair, random: SampleRandom, **conditioning: Any
    ) -> Tensor:
        return self.solver(self.denoise, sample, pair.sigma, pair.sigma_lower, **conditioning)


@dataclass(frozen=True)
class PartlyFromData:
    """Another source for most samples, and the data for the others, from which a student learns its teacher's errors.

    Args:
        source ([`Source`]): of the others.
        share (`float`): of the samples whose point comes from the data.
    """

    source: Source
    share: float

    def __call__(
        self, images: Tensor, noise: Tensor, sample: Tensor, pair: LevelPair, random: SampleRandom, **conditioning: Any
    ) -> Tensor:
        own = from_data(images, noise, sample, pair, random)
        other = self.source(images, noise, sample, pair, random, **conditioning)
        return torch.where(chosen(random, self.share, images), own, other)


def chosen(random: SampleRandom, share: float, images: Tensor) -> Tensor:
    """True for a share of the samples, ready to choose among `images`."""
    return expand(random.uniform() < share, images).bool()


@dataclass(frozen=True)
class Piecewise:
    """f of a student that only knows the levels from `sigma_boundary` up; another model answers below.

    Args:
        above, below (`Callable`): the two consistency functions.
        sigma_boundary (`float`): the lowest level of the first.
    """

    above: Denoise
    below: Denoise
    sigma_boundary: float

    def __call__(self, sample: Tensor, sigma: Tensor, **conditioning: Any) -> Tensor:
        # Both on the whole batch: shapes that change with the noise levels would be compiled anew every step.
        student, other = (f(sample, sigma, **conditioning) for f in (self.above, self.below))
        return torch.where(expand(sigma >= self.sigma_boundary, sample).bool(), student, other)


@dataclass(frozen=True)
class PairObjective:
    """`weighting * distance(f(x, sigma), f_target(x_lower, sigma_lower))` (Song et al. 2023, equations 7 and 10).

    Args:
        student ([`~cm_diffusers.preconditioning.Denoiser`]): f, with gradient.
        target (`Callable`): f of the target weights; may share the student's network.
        levels ([`~cm_diffusers.noise_levels.Levels`]): the pairs of noise levels.
        source ([`Source`]): teacher or data.
        distance (`Callable`): per sample.
        weighting (`Callable`): of a pair.
    """

    student: Denoiser
    target: Denoise
    levels: Levels
    source: Source
    distance: Distance
    weighting: Weighting

    def losses(self, images: Tensor, step: int, random: SampleRandom, **conditioning: Any) -> Losses:
        pair = self.levels.at(step, random.uniform())
        noise = random.normal_like(images)
        sample = images + expand(pair.sigma, images) * noise
        with torch.no_grad():
            lower = self.source(images, noise, sample, pair, random, **conditioning)
            with same_dropout(self.student.network, images.device):
                target = self.target(lower, pair.sigma_lower, **conditioning)
        # Torch up to 2.9 keeps the weights that autocast has cast in there. They have no gradient, and the student,
        # where its network is the target's, would be given them.
        torch.clear_autocast_cache()
        prediction = self.student(sample, pair.sigma, **conditioning)
        weights = send(self.weighting(pair), images.device)
        return Losses(weights * self.distance(prediction, target), pair.sigma, prediction)


@contextmanager
def same_dropout(network: Any, device: torch.device) -> Iterator[None]:
    """Afterwards, the next forward pass draws the dropout masks that were drawn inside.

    On an accelerator the masks come from the accelerator's own generator, on the CPU from the CPU's.
    """
    if not has_dropout(network):
        yield
        return
    backend = None if device.type == "cpu" else getattr(torch, device.type)
    state = torch.get_rng_state() if backend is None else backend.get_rng_state(device)
    yield
    torch.set_rng_state(state) if backend is None else backend.set_rng_state(state, device)


def has_dropout(network: Any) -> bool:
    """Whether a forward pass of `network` draws random masks."""
    if not isinstance(network, nn.Module):
        return False
    return any(isinstance(module, nn.Dropout) and module.p > 0 and module.training for module in network.modules())
