"""Samples beside the reference images that they are nearest to: whether a model repeats what it has seen."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cm_diffusers.evaluation.metrics import evenly_spread


@dataclass(frozen=True)
class Neighbours:
    """The nearest images of a reference.

    Args:
        rows (`Tensor` of shape `(n, k)`): their indices, the nearest first.
        distances (`Tensor` of shape `(n, k)`): in features.
        typical (`float`): the median distance of a reference image to its own nearest neighbour.
    """

    rows: Tensor
    distances: Tensor
    typical: float

    def first(self, count: int) -> Neighbours:
        """Those of the first samples."""
        return Neighbours(self.rows[:count], self.distances[:count], self.typical)

    @property
    def share_of_copies(self) -> float:
        """The share of samples far nearer to a reference image than those are to each other (less than a third)."""
        return float((self.distances[:, 0] < self.typical / 3).double().mean())


def nearest(features: Tensor, reference: Tensor, count: int = 3) -> Neighbours:
    """The `count` nearest reference images of each sample, by Euclidean distance of features.

    Args:
        features (`Tensor` of shape `(n, d)`): of samples.
        reference (`Tensor` of shape `(m, d)`): of real images.
    """
    distances = torch.cat([torch.cdist(part.double(), reference.double()) for part in features.split(1000)])
    found = distances.topk(min(count, len(reference)), dim=1, largest=False)
    some = reference[evenly_spread(len(reference), 1000)].double()
    among = torch.cdist(some, reference.double()).topk(2, dim=1, largest=False).values[:, 1]
    return Neighbours(found.indices, found.values, float(among.median()))
