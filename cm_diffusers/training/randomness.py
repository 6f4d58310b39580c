"""Random numbers as pure functions of the run's seed and of a sample's place in it.

The noise, the noise level, the crop and the flip of a sample depend on nothing else. So the same images meet the same
noise however a global batch is spread over processes and micro-steps, and a run that is resumed needs no saved state.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

_MASK = 2**64 - 1


def mixed(*numbers: int) -> int:
    """One number below 2**63 from several: different for other numbers, and for the same in another order."""
    state = 0
    for number in numbers:
        state = _finalize((state + number + 1) * 0x9E3779B97F4A7C15 & _MASK)
    return state >> 1


def _finalize(z: int) -> int:
    """The output function of SplitMix64 (Steele et al. 2014, figure 16)."""
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & _MASK
    z = (z ^ z >> 27) * 0x94D049BB133111EB & _MASK
    return z ^ z >> 31


def permutation(length: int, *numbers: int) -> np.ndarray:
    """The order of `length` rows that belongs to `numbers`."""
    return np.random.Generator(np.random.PCG64(mixed(*numbers))).permutation(length)


class SampleRandom:
    """Random numbers for a batch, each sample's from its own seed.

    Args:
        seeds (`Tensor` of shape `(batch,)`): whole numbers, on the CPU.
        device (`torch.device`): where the noise is drawn. Accelerators draw other numbers than the CPU.
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
        """Standard normal noise of the shape and memory format of `images`, on the device; new numbers every call."""
        self._drawn += 1
        # Numbers are drawn in the order of memory, which must not depend on its format.
        noise = torch.empty(images.shape, dtype=images.dtype, device=self.device)
        rng = torch.Generator(self.device)
        for sample, seed in zip(noise, self.seeds, strict=True):
            sample.normal_(generator=rng.manual_seed(mixed(seed, self._drawn)))
        return noise if images.is_contiguous() else torch.empty_like(images).copy_(noise)


def generators(seeds: Sequence[int]) -> list[torch.Generator]:
    """One for each image, on the CPU: the same noise on every device."""
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def labels_in_turn(classes: Sequence[int], seeds: Sequence[int], only: int | None = None) -> list[int] | None:
    """The class of each image: all in turn, in equal shares, or `only` one; `None` without classes."""
    if not classes:
        return None
    return [classes[seed % len(classes)] if only is None else only for seed in seeds]
