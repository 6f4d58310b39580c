"""Every metric against its definition, written out in the plainest way."""

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

from cm_diffusers.evaluation import all_metrics, frechet_distance
from cm_diffusers.evaluation.metrics import density_coverage, inception_score, kernel_distance, precision_recall


@pytest.fixture
def sets(generator):
    """Two clouds that overlap in part."""
    a = torch.randn(300, 6, generator=generator, dtype=torch.float64) @ torch.randn(6, 6, generator=generator).double()
    return a, torch.randn(240, 6, generator=generator, dtype=torch.float64) + 0.5


def test_frechet_distance_by_matrix_square_root(sets):
    a, b = sets
    mean = a.mean(0) - b.mean(0)
    expected = float(mean @ mean + torch.trace(a.T.cov() + b.T.cov())) - 2 * sqrtm(a.T.cov() @ b.T.cov()).trace().real
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)


def test_frechet_distance_in_one_dimension(generator):
    a = 2 * torch.randn(200_000, 1, generator=generator) + 1
    b = torch.randn(200_000, 1, generator=generator)
    assert frechet_distance(a, b) == pytest.approx(1 + (2 - 1) ** 2, rel=0.03)


def test_degenerate_features_are_no_problem(generator):
    a = torch.zeros(50, 4)
    a[:, 0] = torch.randn(50, generator=generator)
    assert frechet_distance(a, a + 1) == pytest.approx(4, abs=1e-4)


def test_kernel_distance_by_double_sums(sets):
    a, b = (part[:240] for part in sets)  # a subset is then the whole set
    total = 0.0
    for x, y, weight in ((a, a, 1), (b, b, 1), (a, b, -2)):
        kernel = (x @ y.T / 6 + 1) ** 3
        if weight == 1:
            total += float((kernel.sum() - kernel.trace()) / (240 * 239))
        else:
            total -= 2 * float(kernel.mean())
    mean, spread = kernel_distance(a, b)
    assert mean == pytest.approx(total, rel=1e-6)
    assert spread == pytest.approx(0, abs=1e-9)


def test_precision_and_recall_by_counting(sets):
    a, b = sets

    def share_inside(points, manifold):
        inside = 0
        for point in points:
            for center in manifold:
                radius = sorted(float((center - other).norm()) for other in manifold)[3]
                if float((point - center).norm()) <= radius:
                    inside += 1
                    break
        return inside / len(points)

    a, b = a[:60], b[:50]
    assert precision_recall(a, b) == pytest.approx((share_inside(a, b), share_inside(b, a)), rel=1e-6)


def test_density_and_coverage_by_counting(sets):
    a, b = sets[0][:60], sets[1][:50]
    radii = [sorted(float((center - other).norm()) for other in b)[5] for center in b]
    hits = np.array([[float((x - y).norm()) < r for x in a] for y, r in zip(b, radii, strict=True)])
    expected = hits.sum() / (5 * len(a)), hits.any(1).mean()
    assert density_coverage(a, b) == pytest.approx(expected, rel=1e-6)


def test_inception_score_by_definition(generator):
    logits = 3 * torch.randn(500, 7, generator=generator)
    order = np.random.RandomState(2020).permutation(500)
    p = logits.double().softmax(1).numpy()[order]
    scores = []
    for part in np.split(p, 10):
        scores.append(np.exp((part * np.log(part / part.mean(0))).sum(1).mean()))
    assert inception_score(logits) == pytest.approx(np.mean(scores), rel=1e-6)
    assert inception_score(torch.eye(10).repeat(100, 1) * 100) == pytest.approx(10, rel=0.05)


def test_halves_of_one_set_are_near(generator):
    features = torch.randn(3000, 8, generator=generator)
    found = all_metrics(features[:1500], features[1500:])
    assert 0 <= found["fid"] < 0.1
    assert abs(found["kid"]) < 0.01
    assert found["precision"] == pytest.approx(found["recall"], abs=0.03)
    assert found["density"] == pytest.approx(1, abs=0.05)
    assert found["coverage"] > 0.95
    far = features[:1500] + 3, features[1500:]
    assert frechet_distance(*far) == pytest.approx(8 * 9, rel=0.05)
    assert precision_recall(*far)[0] < 0.05 and density_coverage(*far)[1] < 0.05


def test_data_sorted_by_class_give_the_figures_of_shuffled_ones(generator, monkeypatch):
    monkeypatch.setattr("cm_diffusers.evaluation.metrics.MOST_FOR_NEIGHBOURS", 200)
    centers = 20 * torch.randn(10, 6, generator=generator)
    reference = centers.repeat_interleave(100, 0) + torch.randn(1000, 6, generator=generator)
    samples = centers.repeat(20, 1) + torch.randn(200, 6, generator=generator)
    found = all_metrics(samples, reference)
    assert found["precision"] > 0.5 and found["density"] > 0.5 and found["coverage"] > 0.8


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (torch.zeros(5, 3), torch.zeros(5, 4)),
        (torch.zeros(1, 3), torch.zeros(5, 3)),
        (torch.full((5, 3), float("nan")), torch.zeros(5, 3)),
    ],
)
@pytest.mark.parametrize("metric", [frechet_distance, kernel_distance, precision_recall, density_coverage])
def test_bad_features_are_refused(metric, a, b):
    with pytest.raises(ValueError):
        metric(a, b)
