"""What two sets of images have in common, on the features of some network.

Fréchet and kernel distance, Inception score, precision and recall are torch-fidelity's.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

# As torch-fidelity and the papers have them.
KID_SUBSETS, KID_SUBSET_SIZE = 100, 1000
INCEPTION_SCORE_SPLITS = 10
NEIGHBOURS = 3
DENSITY_NEIGHBOURS = 5
# Neighbours are searched among so many images: distances grow with their square.
MOST_FOR_NEIGHBOURS = 10_000


def frechet_distance(features: Tensor, reference: Tensor) -> float:
    """Fréchet distance between Gaussians fitted to two sets of features; FID when they are Inception's.

    `||mean difference||^2 + tr(A + B - 2 (A B)^(1/2))` (Heusel et al. 2017, equation 6), in float64.

    Args:
        features (`Tensor` of shape `(n, d)`): of the images in question, n >= 2.
        reference (`Tensor` of shape `(m, d)`): of the images they should look like, m >= 2.

    Raises:
        `ValueError`: if the shapes do not fit, or a feature is not finite.
    """
    from torch_fidelity import metric_fid

    statistics = [metric_fid.fid_features_to_statistics(part) for part in _checked(features, reference)]
    for found in statistics:
        found["sigma"] = np.atleast_2d(found["sigma"])  # of a single feature it is a number
    return float(metric_fid.fid_statistics_to_metric(*statistics, verbose=False)[metric_fid.KEY_METRIC_FID])


def kernel_distance(features: Tensor, reference: Tensor) -> tuple[float, float]:
    """Squared maximum mean discrepancy under a cubic kernel, unbiased: KID (Bińkowski et al. 2018, section 4).

    Returns:
        `tuple[float, float]`: mean and standard deviation over random subsets of up to 1,000 images.
    """
    from torch_fidelity import metric_kid

    features, reference = _checked(features, reference)
    size = min(KID_SUBSET_SIZE, len(features), len(reference))
    found = metric_kid.kid_features_to_metric(
        features, reference, kid_subsets=KID_SUBSETS, kid_subset_size=size, verbose=False
    )
    return float(found[metric_kid.KEY_METRIC_KID_MEAN]), float(found[metric_kid.KEY_METRIC_KID_STD])


def inception_score(logits: Tensor) -> float:
    """Exponential of the mean divergence of a classifier's answers from their mean (Salimans et al. 2016, section 4).

    Args:
        logits (`Tensor` of shape `(n, classes)`): the answers before softmax.
    """
    from torch_fidelity import metric_isc

    splits = min(INCEPTION_SCORE_SPLITS, len(logits))
    return float(metric_isc.isc_features_to_metric(logits.cpu(), splits)[metric_isc.KEY_METRIC_ISC_MEAN])


def precision_recall(features: Tensor, reference: Tensor) -> tuple[float, float]:
    """Shares of images within the other set's manifold (Kynkäänniemi et al. 2019, section 3), three neighbours.

    Returns:
        `tuple[float, float]`: precision, of `features` among `reference`; recall, the other way round.
    """
    from torch_fidelity import metric_prc

    features, reference = _checked(features, reference)
    found = metric_prc.prc_features_to_metric(
        features, reference, prc_neighborhood=_neighbours(NEIGHBOURS, features, reference), verbose=False
    )
    return float(found[metric_prc.KEY_METRIC_PRECISION]), float(found[metric_prc.KEY_METRIC_RECALL])


def density_coverage(features: Tensor, reference: Tensor) -> tuple[float, float]:
    """How often images lie in the neighbourhoods of real ones, and how many of those have one (Naeem et al. 2020,
    equations 4 and 5), five neighbours.

    Returns:
        `tuple[float, float]`: density, 1 for the same distribution and not limited by it; coverage, in [0, 1].
    """
    features, reference = _checked(features, reference)
    neighbours = _neighbours(DENSITY_NEIGHBOURS, features, reference)
    radius = torch.cdist(reference, reference).kthvalue(neighbours + 1).values  # the first is itself
    distances = torch.cdist(reference, features)
    inside = distances < radius[:, None]
    return float(inside.double().sum(0).mean() / neighbours), float(inside.any(1).double().mean())


def all_metrics(features: Tensor, reference: Tensor, logits: Tensor | None = None) -> dict[str, float]:
    """`fid`, `kid`, `precision`, `recall`, `density`, `coverage`, and `inception_score` where there are logits.

    Neighbours are searched among the first 10,000 samples, whose order means nothing, and 10,000 reference images
    spread evenly over all: data are often sorted by class.
    """
    few = features[:MOST_FOR_NEIGHBOURS]
    few_real = reference[evenly_spread(len(reference), MOST_FOR_NEIGHBOURS)]
    found = {"fid": frechet_distance(features, reference), "kid": kernel_distance(features, reference)[0]}
    found["precision"], found["recall"] = precision_recall(few, few_real)
    found["density"], found["coverage"] = density_coverage(few, few_real)
    return found if logits is None else {**found, "inception_score": inception_score(logits)}


def evenly_spread(length: int, count: int) -> Tensor:
    """Up to `count` of the rows 0 to `length - 1`, from the first to the last."""
    return torch.linspace(0, length - 1, min(length, count), dtype=torch.float64).long()


def _neighbours(wanted: int, *sets: Tensor) -> int:
    return min(wanted, *(len(features) - 1 for features in sets))


def _checked(features: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """Both in float64 on the CPU, if they can be compared."""
    if features.ndim != 2 or reference.ndim != 2 or features.shape[1] != reference.shape[1]:
        raise ValueError(f"Features must be (n, d) and (m, d), got {tuple(features.shape)}, {tuple(reference.shape)}.")
    if min(len(features), len(reference)) < 2:
        raise ValueError("Two samples at least are needed on each side.")
    if not (features.isfinite().all() and reference.isfinite().all()):
        raise ValueError("Features must be finite.")
    return features.double().cpu(), reference.double().cpu()
