"""Distances between two sets of images, on the features of some network."""

from __future__ import annotations

import torch
from torch import Tensor


def frechet_distance(features: Tensor, reference: Tensor) -> float:
    """Fréchet distance between Gaussians fitted to two sets of features; FID when they are Inception's.

    `||mean difference||^2 + tr(A + B - 2 (A B)^(1/2))` (Heusel et al. 2017, equation 6), in float64. The trace of the
    root is the sum of the roots of the eigenvalues of `A B`, which are real and not negative up to rounding.

    Args:
        features (`Tensor` of shape `(n, d)`): of the images in question, n >= 2.
        reference (`Tensor` of shape `(m, d)`): of the images they should look like, m >= 2.

    Raises:
        `ValueError`: if the shapes do not fit, or a feature is not finite.
    """
    if features.ndim != 2 or reference.ndim != 2 or features.shape[1] != reference.shape[1]:
        raise ValueError(f"Features must be (n, d) and (m, d), got {tuple(features.shape)}, {tuple(reference.shape)}.")
    if min(len(features), len(reference)) < 2:
        raise ValueError("A covariance needs at least two samples on each side.")
    features, reference = features.double().cpu(), reference.double().cpu()
    if not (features.isfinite().all() and reference.isfinite().all()):
        raise ValueError("Features must be finite.")
    mean_difference = features.mean(0) - reference.mean(0)
    a, b = torch.atleast_2d(torch.cov(features.T)), torch.atleast_2d(torch.cov(reference.T))
    root_trace = torch.linalg.eigvals(a @ b).real.clamp(min=0).sqrt().sum()
    return float(mean_difference.square().sum() + a.trace() + b.trace() - 2 * root_trace)
