"""Random numbers as pure functions of the run's seed and of a sample's place in it.

The noise, the noise level, the crop and the flip of a sample depend on nothing else. So the same images meet the same
noise however a global batch is spread over processes and micro-steps, on whatever device, and a run that is resumed
needs no saved state.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from cm_diffusers.networks import send

_GAMMA = 0x9E3779B97F4A7C15  # the increment of SplitMix64 (Steele et al. 2014)
_MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
_MASK = 2**64 - 1


def mixed(*numbers: int) -> int:
    """One number below 2**63 from several: different for other numbers, and for the same in another order."""
    state = 0
    for number in numbers:
        state = _finalize((state + number + 1) * _GAMMA & _MASK)
    return state >> 1


def _finalize(z: int) -> int:
    """The output function of SplitMix64 (figure 16)."""
    z = (z ^ z >> 30) * _MULTIPLIERS[0] & _MASK
    z = (z ^ z >> 27) * _MULTIPLIERS[1] & _MASK
    return z ^ z >> 31


def streams(seeds: Tensor, length: int) -> Tensor:
    """The first numbers of the SplitMix64 generator of each seed: 64 bits each, as signed integers.

    Args:
        seeds (`Tensor` of shape `(batch,)`): int64, on any device; the numbers are the same on all.
        length (`int`): of each stream.

    Returns:
        `Tensor` of shape `(batch, length)`: int64, whose sums and products wrap.
    """
    states = torch.arange(1, length + 1, device=seeds.device) * _signed(_GAMMA)
    z = seeds[:, None] + states
    for bits, multiplier in zip((30, 27), _MULTIPLIERS, strict=True):
        z = (z ^ _shifted(z, bits)).mul_(_signed(multiplier))
    return z ^ _shifted(z, 31)


def _signed(number: int) -> int:
    """A number of 64 bits as int64 holds it."""
    return number - 2**64 if number >= 2**63 else number


def _shifted(z: Tensor, bits: int) -> Tensor:
    """Shifted to the right without a sign."""
    return (z >> bits).bitwise_and_(2 ** (64 - bits) - 1)


def permutation(length: int, *numbers: int) -> np.ndarray:
    """The order of `length` rows that belongs to `numbers`."""
    return np.random.Generator(np.random.PCG64(mixed(*numbers))).permutation(length)


class SampleRandom:
    """Random numbers for a batch, each sample's from its own seed.

    Args:
        seeds (`Tensor` of shape `(batch,)`): whole numbers, on the CPU.
        device (`torch.device`): where the noise is drawn: the same on all of them, up to the rounding of functions.
    """

    def __init__(self, seeds: Tensor, device: torch.device) -> None:
        self.seeds, self.device = [int(seed) for seed in seeds], device
        self._drawn = 0

    def uniform(self) -> Tensor:
        """Uniform on [0, 1), of shape `(batch,)`, in float64 on the CPU. Each call draws new numbers."""
        self._drawn += 1
        numbers = [mixed(seed, self._drawn) >> 10 for seed in self.seeds]
        return torch.tensor(numbers, dtype=torch.float64) * 2.0**-53

    def normal_like(self, images: Tensor) -> Tensor:
        """Standard normal noise of the shape and memory format of `images`, on the device; new numbers every call.

        By Box and Muller (1958): 32 bits of each number make a radius, 32 an angle, so none is beyond 6.8.
        """
        self._drawn += 1
        seeds = torch.tensor([mixed(seed, self._drawn) for seed in self.seeds])
        numbers = math.prod(images.shape[1:])
        bits = streams(send(seeds, self.device), (numbers + 1) // 2)
        radius = ((_shifted(bits, 32).float() + 0.5) * 2.0**-32).log_().mul_(-2.0).sqrt_()
        angle = bits.bitwise_and_(2**32 - 1).float().mul_(2 * math.pi * 2.0**-32)
        pairs = torch.stack([radius * angle.cos(), radius * angle.sin()], dim=-1)
        noise = pairs.flatten(1)[:, :numbers].reshape(images.shape)
        return torch.empty_like(images, device=self.device).copy_(noise)


def generators(seeds: Sequence[int]) -> list[torch.Generator]:
    """One for each image, on the CPU: the same noise on every device."""
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def labels_in_turn(classes: Sequence[int], seeds: Sequence[int], only: int | None = None) -> list[int] | None:
    """The class of each image: all in turn, in equal shares, or `only` one; `None` without classes."""
    if not classes:
        return None
    return [classes[seed % len(classes)] if only is None else only for seed in seeds]
