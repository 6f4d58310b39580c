import pytest
import torch
from scipy.linalg import sqrtm

from cm_diffusers.evaluation import frechet_distance


def test_agrees_with_the_definition_by_matrix_square_root(generator):
    a = torch.randn(500, 6, generator=generator, dtype=torch.float64) @ torch.randn(6, 6, generator=generator).double()
    b = torch.randn(400, 6, generator=generator, dtype=torch.float64) + 0.5
    mean = a.mean(0) - b.mean(0)
    expected = float(mean @ mean + torch.trace(a.T.cov() + b.T.cov())) - 2 * sqrtm(a.T.cov() @ b.T.cov()).trace().real
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)


def test_closed_form_for_one_dimension(generator):
    a = 2 * torch.randn(200_000, 1, generator=generator) + 1
    b = torch.randn(200_000, 1, generator=generator)
    assert frechet_distance(a, b) == pytest.approx(1 + (2 - 1) ** 2, rel=0.03)


def test_a_set_has_no_distance_to_itself(generator):
    a = torch.randn(300, 8, generator=generator)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-6)


def test_degenerate_features_are_no_problem(generator):
    a = torch.zeros(50, 4)
    a[:, 0] = torch.randn(50, generator=generator)
    assert frechet_distance(a, a + 1) == pytest.approx(4, abs=1e-4)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (torch.zeros(5, 3), torch.zeros(5, 4)),
        (torch.zeros(1, 3), torch.zeros(5, 3)),
        (torch.full((5, 3), float("nan")), torch.zeros(5, 3)),
    ],
)
def test_bad_features_are_refused(a, b):
    with pytest.raises(ValueError):
        frechet_distance(a, b)
