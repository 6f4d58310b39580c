import pytest
import torch
from closed_form import Gaussian, Mixture

from cm_diffusers.noise_levels import karras_grid
from cm_diffusers.solvers import euler_step, heun_step, integrate

GAUSSIAN = Gaussian()


def exact_step(problem: Gaussian, x, sigma: float, sigma_next: float):
    """Along a Gaussian's PF-ODE, x - mean scales like the marginal's width."""
    scale = ((problem.std**2 + sigma_next**2) / (problem.std**2 + sigma**2)) ** 0.5
    return problem.mean + (x - problem.mean) * scale


@pytest.mark.parametrize(("solver", "order"), [(euler_step, 1), (heun_step, 2)])
def test_global_error_shrinks_with_the_order_of_the_solver(solver, order, generator):
    x = 3 * torch.randn(64, 1, 1, 1, dtype=torch.float64, generator=generator)
    truth = exact_step(GAUSSIAN, x, 3.0, 0.1)
    errors = []
    for steps in (64, 128, 256):
        state, sigmas = x, torch.linspace(3.0, 0.1, steps + 1, dtype=torch.float64)
        for sigma, sigma_next in zip(sigmas[:-1], sigmas[1:], strict=True):
            state = solver(GAUSSIAN.denoise, state, sigma, sigma_next)
        errors.append(float((state - truth).abs().max()))
    for coarse, fine in zip(errors[:-1], errors[1:], strict=True):
        assert coarse / fine == pytest.approx(2**order, rel=0.15)


@pytest.mark.parametrize("solver", [euler_step, heun_step])
def test_samples_of_a_batch_are_stepped_at_their_own_noise_levels(solver, generator):
    x = torch.randn(3, 1, 2, 2, dtype=torch.float64, generator=generator)
    sigma, lower = torch.tensor([0.5, 2.0, 40.0]), torch.tensor([0.1, 1.5, 10.0])
    together = solver(Mixture().denoise, x, sigma, lower)
    for i in range(3):
        alone = solver(Mixture().denoise, x[i : i + 1], float(sigma[i]), float(lower[i]))
        torch.testing.assert_close(together[i : i + 1], alone)


def test_euler_in_sigma_space_is_ddim(generator):
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(clip_sample=False, set_alpha_to_one=False, timestep_spacing="leading")
    scheduler.set_timesteps(10)
    alpha_bar = scheduler.alphas_cumprod.double()
    sigmas = ((1 - alpha_bar) / alpha_bar).sqrt()
    t, t_next = int(scheduler.timesteps[3]), int(scheduler.timesteps[4])
    x = torch.randn(4, 1, 2, 2, dtype=torch.float64, generator=generator) * sigmas[t]
    epsilon = (x - GAUSSIAN.denoise(x, sigmas[t])) / sigmas[t]
    stock = scheduler.step(epsilon, t, x * alpha_bar[t].sqrt()).prev_sample / alpha_bar[t_next].sqrt()
    torch.testing.assert_close(
        euler_step(GAUSSIAN.denoise, x, sigmas[t], sigmas[t_next]), stock.double(), atol=1e-5, rtol=1e-5
    )


def test_integrating_noise_gives_the_data_distribution(generator):
    problem = Mixture()
    sigmas = karras_grid(40, 0.002, 80.0).flip(0)
    noise = 80 * torch.randn(4000, 1, 1, 1, dtype=torch.float64, generator=generator)
    samples = integrate(problem.denoise, noise, sigmas).flatten()
    assert float((samples < 0).double().mean()) == pytest.approx(problem.weights[0], abs=0.03)
    assert float(samples[samples > 0].mean()) == pytest.approx(problem.means[1], abs=0.02)
    assert float(samples[samples > 0].std()) == pytest.approx(problem.std, rel=0.1)


@pytest.mark.parametrize(("solver", "nfe"), [(euler_step, 5), (heun_step, 9)])
def test_number_of_evaluations(solver, nfe):
    calls = []

    def denoise(x, sigma):
        calls.append(sigma)
        return x

    integrate(denoise, torch.zeros(1, 1, 1, 1), [5.0, 4.0, 3.0, 2.0, 1.0], solver)
    assert len(calls) == nfe
