from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from diffusers import CMStochasticIterativeScheduler

from cm_diffusers.noise_levels import (
    GridLevels,
    MappedLevels,
    default_second_sigma,
    doubling_num_levels,
    karras_grid,
    lognormal_probabilities,
    lognormal_sigmas,
    mapped_lower,
    pairs_at,
    progressive_mu,
    progressive_num_levels,
    stage_at,
)


def chi_square(counts: torch.Tensor, probabilities: torch.Tensor) -> float:
    """Pearson's statistic, in standard deviations above its mean."""
    expected = counts.sum() * probabilities
    degrees = len(counts) - 1
    return float((((counts - expected) ** 2 / expected).sum() - degrees) / math.sqrt(2 * degrees))


# The grid ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_levels", "sigma_max", "rho"), [(18, 80.0, 7.0), (40, 80.0, 7.0), (5, 14.6, 3.0)])
def test_karras_grid_is_the_stock_schedulers(num_levels: int, sigma_max: float, rho: float) -> None:
    stock = CMStochasticIterativeScheduler(num_train_timesteps=num_levels, sigma_max=sigma_max, rho=rho)
    expected = stock.sigmas.flip(0)
    torch.testing.assert_close(karras_grid(num_levels, 0.002, sigma_max, rho).double(), expected, rtol=1e-6, atol=0)


def test_karras_grid_is_linear_in_the_root_of_sigma() -> None:
    roots = karras_grid(11, 0.01, 50.0, rho=5.0).double() ** (1 / 5)
    torch.testing.assert_close(roots.diff(), torch.full((10,), (50**0.2 - 0.01**0.2) / 10).double(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("sigma_min", [0.002, 0.01, 0.0292, 0.1])
def test_karras_grid_has_exact_ends(sigma_min: float) -> None:
    grid = karras_grid(7, sigma_min, 14.6146)
    assert torch.equal(grid[[0, -1]], torch.tensor([sigma_min, 14.6146]))


@pytest.mark.parametrize("num_levels", [1, 0, -3])
def test_karras_grid_refuses_fewer_than_two_levels(num_levels: int) -> None:
    with pytest.raises(ValueError, match=f"num_levels={num_levels}"):
        karras_grid(num_levels, 0.002, 80.0)


@pytest.mark.parametrize(("low", "high"), [(0.0, 80.0), (-1.0, 80.0), (80.0, 0.002), (1.0, 1.0)])
def test_karras_grid_refuses_a_range_that_is_none(low: float, high: float) -> None:
    with pytest.raises(ValueError, match="0 < sigma_min < sigma_max"):
        karras_grid(18, low, high)


# Curricula -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (0, 2),  # sqrt(4) - 1 = 1
        (1, 16),  # sqrt(0.01 * 22797 + 4) - 1 = 14.23
        (10, 48),  # sqrt(0.1 * 22797 + 4) - 1 = 46.79
        (50, 107),  # sqrt(0.5 * 22797 + 4) - 1 = 105.78
        (100, 151),
        (1000, 151),
    ],
)
def test_progressive_num_levels(step: int, expected: int) -> None:
    assert progressive_num_levels(step, 100, s0=2, s1=150) == expected


@pytest.mark.parametrize(
    ("step", "expected"),
    [(0, 11), (99_999, 11), (100_000, 21), (350_000, 81), (700_000, 1281), (800_000, 1281), (9_000_000, 1281)],
)
def test_doubling_num_levels(step: int, expected: int) -> None:
    assert doubling_num_levels(step, 800_000, s0=10, s1=1280) == expected


def test_doubling_ends_at_s1_when_it_is_no_power_of_two_times_s0() -> None:
    # K' = floor(800 / (log2(15) + 1)) = 163.
    steps = (0, 162, 163, 326, 489, 651, 652, 799)
    assert [doubling_num_levels(k, 800, s0=10, s1=150) for k in steps] == [11, 11, 21, 41, 81, 81, 151, 151]


@pytest.mark.parametrize("s1", [10, 11, 15, 25, 35, 100, 1279, 1280, 1281])
def test_doubling_comes_to_s1_before_the_run_ends(s1) -> None:
    assert doubling_num_levels(7_999, 8_000, s0=10, s1=s1) == s1 + 1


def test_doubling_stays_when_both_ends_are_equal() -> None:
    assert {doubling_num_levels(k, 10, s0=17, s1=17) for k in range(30)} == {18}


@pytest.mark.parametrize("curriculum", [progressive_num_levels, doubling_num_levels])
def test_curricula_never_shrink(curriculum) -> None:
    levels = [curriculum(k, 500, 4, 64) for k in range(600)]
    assert all(a <= b for a, b in zip(levels, levels[1:], strict=False))


def test_progressive_mu_starts_at_mu0() -> None:
    assert progressive_mu(2, s0=2, mu0=0.9) == pytest.approx(0.9)


def test_progressive_mu_follows_the_number_of_levels() -> None:
    assert progressive_mu(151, s0=2, mu0=0.95) == pytest.approx(math.exp(2 * math.log(0.95) / 151))


# Pairs ---------------------------------------------------------------------------------------------------------------


def test_lognormal_probabilities_are_the_integrals_of_the_density() -> None:
    sigmas, mean, std = karras_grid(20, 0.002, 80.0), -1.1, 2.0
    expected = []
    for low, high in zip(sigmas.log().tolist(), sigmas.log()[1:].tolist(), strict=False):
        y = np.linspace(low, high, 2001)
        density = np.exp(-((y - mean) ** 2) / (2 * std**2))
        expected.append(((density[1:] + density[:-1]) / 2).sum() * (y[1] - y[0]))
    expected = torch.tensor(expected) / sum(expected)
    torch.testing.assert_close(lognormal_probabilities(sigmas, mean, std), expected, rtol=1e-4, atol=1e-7)


def test_drawn_pairs_are_neighbours_of_the_grid(generator: torch.Generator) -> None:
    grid = karras_grid(9, 0.002, 80.0)
    pairs = pairs_at(grid, torch.rand(500, generator=generator))
    upper, lower = torch.searchsorted(grid, pairs.sigma), torch.searchsorted(grid, pairs.sigma_lower)
    assert torch.equal(grid[upper], pairs.sigma)
    assert torch.equal(upper, lower + 1)


def test_pairs_are_drawn_uniformly_by_default(generator: torch.Generator) -> None:
    grid = karras_grid(11, 0.002, 80.0)
    index = torch.searchsorted(grid, pairs_at(grid, torch.rand(20_000, generator=generator)).sigma_lower)
    assert chi_square(torch.bincount(index, minlength=10), torch.full((10,), 0.1)) < 5


def test_pairs_follow_given_probabilities(generator: torch.Generator) -> None:
    grid = karras_grid(11, 0.002, 80.0)
    probabilities = lognormal_probabilities(grid, -1.1, 2.0)
    index = torch.searchsorted(
        grid, pairs_at(grid, torch.rand(20_000, generator=generator), probabilities).sigma_lower
    )
    assert chi_square(torch.bincount(index, minlength=10), probabilities) < 5


@pytest.mark.parametrize("probabilities", [None, torch.tensor([0.25, 0.0, 0.75])])
def test_ends_of_the_unit_interval_give_the_ends_of_the_grid(probabilities: torch.Tensor | None) -> None:
    grid = torch.tensor([1.0, 2.0, 3.0, 4.0])
    ends = torch.tensor([0.0, 1 - 2.0**-53], dtype=torch.float64)  # rounds to 1 in float32
    assert pairs_at(grid, ends, probabilities).sigma.tolist() == [2.0, 4.0]
    if probabilities is not None:
        assert pairs_at(grid, torch.tensor([0.2499, 0.2501]), probabilities).sigma.tolist() == [2.0, 4.0]


def test_levels_change_grid_with_the_step(generator: torch.Generator) -> None:
    levels = GridLevels(lambda step: 2 if step == 0 else 3, 0.002, 80.0)
    positions = torch.rand(100, generator=generator)
    first, second = levels.at(0, positions), levels.at(1, positions)
    assert set(first.sigma.tolist()) == {80.0}
    assert set(second.sigma.tolist()) == set(karras_grid(3, 0.002, 80.0)[1:].tolist())
    assert torch.equal(levels.at(0, positions).sigma, first.sigma)


def test_levels_pass_lognormal_probabilities_on(generator: torch.Generator) -> None:
    grid = karras_grid(11, 0.002, 80.0)
    drawn = GridLevels(lambda step: 11, 0.002, 80.0, lognormal=(-1.1, 2.0)).at(
        0, torch.rand(20_000, generator=generator)
    )
    index = torch.searchsorted(grid, drawn.sigma_lower)
    assert chi_square(torch.bincount(index, minlength=10), lognormal_probabilities(grid, -1.1, 2.0)) < 5


# Levels that are on no grid ------------------------------------------------------------------------------------------


def test_lognormal_sigmas_have_the_quantiles_of_a_truncated_normal() -> None:
    position = (torch.arange(20_000) + 0.5).double() / 20_000
    found = lognormal_sigmas(position, -1.0, 1.5, 0.05, 20.0).double().log()
    draws = -1.0 + 1.5 * torch.randn(400_000, generator=torch.Generator().manual_seed(0)).double()
    kept = draws[(draws > math.log(0.05)) & (draws < math.log(20.0))]
    quantiles = torch.linspace(0.02, 0.98, 25).double()
    torch.testing.assert_close(found.quantile(quantiles), kept[:250_000].quantile(quantiles), rtol=0, atol=0.02)


def test_lognormal_sigmas_end_where_they_should() -> None:
    ends = lognormal_sigmas(torch.tensor([0.0, 1 - 2.0**-53]).double(), -1.1, 2.0, 0.002, 80.0)
    torch.testing.assert_close(ends, torch.tensor([0.002, 80.0]))


def test_stages_divide_a_run_evenly() -> None:
    assert [stage_at(step, 10, 4) for step in range(12)] == [0, 0, 0, 1, 1, 2, 2, 2, 3, 3, 3, 3]


def test_mapped_lower_levels() -> None:
    # n(2) = 1 + 8 / (1 + e^2) = 1.95362; a half of it is taken away in stage 0, a quarter in stage 1.
    found = [float(mapped_lower(torch.tensor([2.0]), stage, 2.0, 0.002)) for stage in (0, 1)]
    assert found == pytest.approx([2 * (1 - 1.953624 / 2), 2 * (1 - 1.953624 / 4)], rel=1e-4)
    assert float(mapped_lower(torch.tensor([0.1]), 0, 2.0, 0.002)) == pytest.approx(0.002)  # n(0.1) = 4.8


def test_mapped_levels_never_meet() -> None:
    levels = MappedLevels(lambda step: step, 2.0, 0.002, 80.0, -1.1, 2.0)
    position = torch.linspace(0, 1 - 1e-12, 1001, dtype=torch.float64)
    for stage in range(8):
        pair = levels.at(stage, position)
        assert (pair.sigma_lower >= 0.002 * (1 - 1e-6)).all() and (pair.sigma - pair.sigma_lower > 1e-6).all()


def test_truncated_levels_have_their_share_at_the_boundary() -> None:
    levels = MappedLevels(lambda step: 3, 2.0, 0.002, 80.0, -1.1, 2.0, sigma_boundary=0.7)
    pair = levels.at(0, torch.linspace(0, 0.9999, 4000, dtype=torch.float64))
    assert float((pair.sigma == 0.7).double().mean()) == pytest.approx(0.25, abs=0.01)
    assert pair.sigma.min() == pytest.approx(0.7) and pair.sigma_lower.min() < 0.7


@pytest.mark.parametrize(
    ("size", "lowest", "highest"), [(8, 0.5, 0.9), (32, 0.585, 0.821), (64, 1.382, 1.913), (256, 3.991, 4.366)]
)
def test_the_second_of_two_steps_is_about_where_it_was_published_or_measured(size, lowest, highest) -> None:
    assert 0.9 * lowest < default_second_sigma(size) < 1.1 * highest
