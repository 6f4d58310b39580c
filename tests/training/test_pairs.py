"""The objective of cd and ct, against problems whose consistency function is known."""

import functools

import pytest
import torch
from closed_form import Gaussian, Mixture
from pixels import SIGMA_MAX, SIGMA_MIN, PixelNetwork, error, mean_loss, ode_solution
from pixels import train as train_network

from cm_diffusers.noise_levels import GridLevels, LevelPair
from cm_diffusers.preconditioning import Boundary, Denoiser, EDMPreconditioning, VPPreconditioning
from cm_diffusers.solvers import euler_step, heun_step, integrate
from cm_diffusers.training.distances import l2, pseudo_huber
from cm_diffusers.training.objectives.pairs import (
    FromTeacher,
    PairObjective,
    from_data,
    has_dropout,
    inverse_gap,
    same_dropout,
    uniform,
)
from cm_diffusers.training.randomness import SampleRandom


def train(objective_of, problem, steps=1000):
    return objective_of(train_network(objective_of, problem, steps)).student


def build(network, source, num_levels, weighting=inverse_gap, distance=None):
    base = EDMPreconditioning((SIGMA_MIN, SIGMA_MAX), sigma_data=0.6)
    f = Denoiser(network, Boundary(base, "edm", SIGMA_MIN))
    levels = GridLevels(lambda step: num_levels, SIGMA_MIN, SIGMA_MAX)
    return PairObjective(f, f, levels, source, distance or functools.partial(pseudo_huber, c=0.05), weighting)


@pytest.fixture(scope="module")
def gaussian_student():
    problem = Gaussian()
    return train(lambda net: build(net, FromTeacher(problem.denoise, heun_step), 16), problem)


def test_cd_reaches_the_consistency_function_of_a_gaussian(gaussian_student):
    problem, f = Gaussian(), gaussian_student
    # 0.6 is the data's standard deviation.
    assert error(f, lambda x, s: problem.consistency(x, s, SIGMA_MIN), problem) < 0.03


def test_cd_reaches_the_consistency_function_of_a_mixture():
    problem = Mixture()

    f = train(lambda net: build(net, FromTeacher(problem.denoise, heun_step), 20), problem, steps=1500)
    assert error(f, ode_solution(problem), problem) < 0.1


def test_ct_reaches_the_consistency_function_of_a_gaussian():
    problem = Gaussian()
    f = train(lambda net: build(net, from_data, 60, distance=l2), problem, steps=1500)
    assert error(f, lambda x, s: problem.consistency(x, s, SIGMA_MIN), problem) < 0.1


def test_the_true_consistency_function_has_almost_no_loss():
    problem = Gaussian()
    exact = lambda x, sigma: problem.consistency(x, sigma, SIGMA_MIN)  # noqa: E731
    exact.network = None
    losses = []
    for num_levels in (16, 64):
        levels = GridLevels(lambda step, n=num_levels: n, SIGMA_MIN, SIGMA_MAX)
        objective = PairObjective(exact, exact, levels, FromTeacher(problem.denoise, heun_step), l2, uniform)
        images = problem.draw((4096, 1, 1, 1), torch.Generator().manual_seed(0), dtype=torch.float64)
        losses.append(float(mean_loss(objective, images)))
    # A step of the second-order solver errs by O(h^3), squared.
    assert losses[0] < 1e-4
    assert losses[0] / losses[1] > 4**4


def test_loss_is_the_weighted_distance_of_the_two_ends():
    problem, pair = Gaussian(), LevelPair(torch.tensor([2.0, 5.0]), torch.tensor([1.0, 3.0]))

    class OnePair:
        def at(self, step, position):
            return pair

    student, target = (lambda x, s: x * 2), (lambda x, s: x * 3)
    student.network = None
    images = torch.ones(2, 1, 2, 2, dtype=torch.float64)
    objective = PairObjective(student, target, OnePair(), FromTeacher(problem.denoise, euler_step), l2, inverse_gap)
    seeds = torch.tensor([3, 4])
    losses = objective.losses(images, 0, SampleRandom(seeds, images.device))
    random = SampleRandom(seeds, images.device)
    random.uniform()  # the levels
    x = images + pair.sigma.view(-1, 1, 1, 1) * random.normal_like(images)
    lower = euler_step(problem.denoise, x, pair.sigma, pair.sigma_lower)
    distances = (2 * x - 3 * lower).square().mean((1, 2, 3))
    torch.testing.assert_close(losses.values, distances / torch.tensor([1.0, 2.0]))
    assert torch.equal(losses.sigma, pair.sigma)


def test_no_gradient_through_the_target_or_the_teacher():
    problem = Gaussian()
    teacher_network, target_network, network = PixelNetwork(), PixelNetwork(), PixelNetwork()
    base = EDMPreconditioning((SIGMA_MIN, SIGMA_MAX))
    objective = build(network, FromTeacher(Denoiser(teacher_network, base), heun_step), 8)
    objective = PairObjective(
        objective.student, Denoiser(target_network, Boundary(base, "edm", SIGMA_MIN)), objective.levels,
        objective.source, l2, uniform,
    )  # fmt: skip
    mean_loss(objective, problem.draw((8, 1, 1, 1))).backward()
    assert all(p.grad is not None for p in network.parameters())
    assert all(p.grad is None for p in [*teacher_network.parameters(), *target_network.parameters()])


def test_student_and_target_share_their_dropout_mask():
    torch.manual_seed(0)
    network = PixelNetwork(dropout=0.5).train()
    sample, time = torch.randn(64, 1, 1, 1), torch.ones(64)
    with same_dropout(network, torch.device("cpu")):
        first = network(sample, time)[0]
    second = network(sample, time)[0]
    third = network(sample, time)[0]
    assert torch.equal(first, second)
    assert not torch.equal(second, third)


def test_without_dropout_random_numbers_go_on():
    network = PixelNetwork().train()
    assert not has_dropout(network)
    assert not has_dropout(PixelNetwork(dropout=0.5).eval())
    torch.manual_seed(0)
    with same_dropout(network, torch.device("cpu")):
        inside = torch.rand(1)
    assert not torch.equal(inside, torch.rand(1))


def test_one_step_of_the_student_lands_where_the_teachers_many_do(gaussian_student):
    problem, f = Gaussian(), gaussian_student
    noise = SIGMA_MAX * torch.randn(500, 1, 1, 1, generator=torch.Generator().manual_seed(0))
    sigmas = torch.logspace(1, -1.699, 30)
    with torch.no_grad():
        assert (f(noise, SIGMA_MAX) - integrate(problem.denoise, noise, sigmas)).abs().mean() < 0.05


def test_vp_student_has_the_levels_of_its_teacher():
    alpha_bar = torch.linspace(0.999, 0.001, 100)
    base = VPPreconditioning(alpha_bar, "v_prediction")
    assert base.sigma_range[0] == pytest.approx((0.001 / 0.999) ** 0.5, rel=1e-4)
