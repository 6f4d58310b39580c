from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from closed_form import (
    Gaussian,
    IdealNetwork,
    Mixture,
    consistency_network,
    edm_network,
    flow_network,
    ve_network,
    vp_network,
)
from diffusers import (
    CMStochasticIterativeScheduler,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
    ScoreSdeVeScheduler,
)

from cm_diffusers.guidance import GuidedDenoiser, without_class
from cm_diffusers.network_config import (
    EDM_SCHEDULERS,
    FLOW_SCHEDULERS,
    SCALED_TIME_SCHEDULER,
    SUPPORTED_SCHEDULERS,
    VP_SCHEDULERS,
    describe_network,
    preconditioning_from_config,
    read_preconditioning,
)
from cm_diffusers.networks import network_output
from cm_diffusers.preconditioning import (
    BOUNDARIES,
    Boundary,
    CMPreconditioning,
    Denoiser,
    EDMPreconditioning,
    FlowPreconditioning,
    Preconditioning,
    VEPreconditioning,
    VPPreconditioning,
)

PROBLEMS = [pytest.param(Gaussian(), id="gaussian"), pytest.param(Mixture(), id="mixture")]
VP_TEACHERS = {
    "linear": DDPMScheduler(),
    "scaled_linear": DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"),
    "squaredcos_cap_v2": DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
    "sigmoid": DDPMScheduler(beta_schedule="sigmoid"),
    "trained_betas": DDPMScheduler(trained_betas=np.linspace(0.001, 0.3, 50).tolist(), num_train_timesteps=50),
    "exp": HeunDiscreteScheduler(beta_schedule="exp"),
    "zero_snr": DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", rescale_betas_zero_snr=True
    ),
}
ALL_TEACHERS = {
    "vp-epsilon": DDPMScheduler(),
    "vp-v_prediction": DDPMScheduler(prediction_type="v_prediction"),
    "vp-sample": DDPMScheduler(prediction_type="sample"),
    "edm": EDMEulerScheduler(),
    "edm-negative": EDMEulerScheduler(prediction_type="v_prediction"),
    "consistency": CMStochasticIterativeScheduler(),
    "flow": FlowMatchEulerDiscreteScheduler(),
    "ve": ScoreSdeVeScheduler(),
}
ALLOWED = [(name, form) for name in ALL_TEACHERS for form in BOUNDARIES if form == "edm" or name != "consistency"]
ALLOWED = [(name, form) for name, form in ALLOWED if form != "lcm" or name.startswith("vp")]
IDENTITIES = [(name, form) for name, form in ALLOWED if form != "lcm"]  # of x; that form's is of unit variance


def sigmas_over(low: float, high: float, number: int = 25) -> torch.Tensor:
    """`number` noise levels from one end to the other, evenly in the logarithm. Networks are told the time in float32:
    the levels are numbers of float32, too."""
    return torch.from_numpy(np.geomspace(low * (1 + 1e-6), high * (1 - 1e-6), number)).float().double()


def noisy_batch(problem: Gaussian | Mixture, sigmas: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """One sample of shape (2, 3, 3) at each noise level, in float64."""
    shape, factory = (len(sigmas), 2, 3, 3), {"generator": generator, "dtype": torch.float64}
    return problem.draw(shape, **factory) + sigmas.view(-1, 1, 1, 1) * torch.randn(shape, **factory)


def assert_denoises(teacher: Any, network: IdealNetwork, problem: Any, generator: torch.Generator) -> None:
    """D of the teacher's family around its ideal network is the true denoiser, over the family's whole range."""
    preconditioning = read_preconditioning(teacher)
    sigmas = sigmas_over(*preconditioning.sigma_range)
    x = noisy_batch(problem, sigmas, generator)
    denoised = Denoiser(network, preconditioning)(x, sigmas)
    torch.testing.assert_close(denoised, problem.denoise(x, sigmas), rtol=0, atol=1e-5)


# D against the truth -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("schedule", ["linear", "scaled_linear"])
def test_vp_denoises_exactly(schedule: str, prediction_type: str, problem: Any, generator: torch.Generator) -> None:
    teacher = DDPMScheduler.from_config(VP_TEACHERS[schedule].config, prediction_type=prediction_type)
    network = vp_network(problem.denoise, teacher.alphas_cumprod, prediction_type)
    assert_denoises(teacher, network, problem, generator)


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize(("prediction_type", "sign"), [("epsilon", 1.0), ("v_prediction", -1.0)])
@pytest.mark.parametrize("sigma_data", [0.5, 0.3])
def test_edm_denoises_exactly(
    sigma_data: float, prediction_type: str, sign: float, problem: Any, generator: torch.Generator
) -> None:
    teacher = EDMEulerScheduler(prediction_type=prediction_type, sigma_data=sigma_data)
    assert_denoises(teacher, edm_network(problem.denoise, sigma_data, sign), problem, generator)


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("num_train_timesteps", [1000, 500])
def test_flow_denoises_exactly(num_train_timesteps: int, problem: Any, generator: torch.Generator) -> None:
    teacher = FlowMatchEulerDiscreteScheduler(num_train_timesteps=num_train_timesteps)
    assert_denoises(teacher, flow_network(problem.denoise, num_train_timesteps), problem, generator)


@pytest.mark.parametrize("problem", PROBLEMS)
def test_ve_denoises_exactly(problem: Any, generator: torch.Generator) -> None:
    assert_denoises(ScoreSdeVeScheduler(), ve_network(problem.denoise), problem, generator)


def test_consistency_network_gives_the_exact_consistency_function(generator: torch.Generator) -> None:
    problem, preconditioning = Gaussian(), read_preconditioning(CMStochasticIterativeScheduler())
    sigmas = sigmas_over(0.0021, 80.0)
    x = noisy_batch(problem, sigmas, generator)
    network = consistency_network(lambda x, sigma: problem.consistency(x, sigma, 0.002))
    expected = problem.consistency(x, sigmas, 0.002)
    torch.testing.assert_close(Denoiser(network, preconditioning)(x, sigmas), expected, rtol=0, atol=1e-5)


def test_gaussian_consistency_function_solves_the_pf_ode() -> None:
    """The oracle itself: many small Euler steps of `dx/dsigma = (x - D) / sigma` end where it says."""
    problem, start = Gaussian(), torch.tensor([[-60.0, 3.0, 90.0]], dtype=torch.float64)
    sigmas = np.geomspace(80.0, 0.1, 20_001).tolist()
    x = start
    for sigma, lower in zip(sigmas, sigmas[1:], strict=False):
        x = x + (lower - sigma) * (x - problem.denoise(x, sigma)) / sigma
    torch.testing.assert_close(x, problem.consistency(start, 80.0, 0.1), rtol=0, atol=2e-3)


def test_mixture_denoiser_is_the_score_of_its_density() -> None:
    """The oracle itself: Tweedie's formula, with the score by automatic differentiation of the density."""
    problem, sigma = Mixture(), 0.4
    x = torch.linspace(-3, 3, 50, dtype=torch.float64, requires_grad=True)
    components = zip(problem.weights, problem.means, strict=True)
    density = sum(w * torch.exp(-((x - m) ** 2) / (2 * (problem.std**2 + sigma**2))) for w, m in components)
    (score,) = torch.autograd.grad(density.log().sum(), x)
    torch.testing.assert_close(problem.denoise(x, sigma), (x + sigma**2 * score).detach())


# Boundary forms ------------------------------------------------------------------------------------------------------


def random_network(sample: torch.Tensor, timestep: torch.Tensor, return_dict: bool = False) -> tuple[torch.Tensor]:
    """Some function of both arguments: what a boundary form does must not depend on what the network says."""
    return (torch.sin(7 * sample) + torch.cos(timestep).view(-1, *[1] * (sample.ndim - 1)),)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("name", "form"), IDENTITIES)
def test_boundary_is_the_identity_at_sigma_min(
    name: str, form: str, dtype: torch.dtype, generator: torch.Generator
) -> None:
    x = torch.randn(2, 3, 4, 4, generator=generator, dtype=dtype)
    base = read_preconditioning(ALL_TEACHERS[name])
    levels = np.random.default_rng(0).uniform(max(0.02, base.sigma_range[0]), 0.2, 50)
    for sigma_min in [base.sigma_range[0], *levels.tolist()]:
        f = Denoiser(random_network, Boundary(base, form, sigma_min))
        assert torch.equal(f(x, sigma_min), x), sigma_min


@pytest.mark.parametrize("name", [name for name, form in ALLOWED if form == "lcm"])
def test_lcm_boundary_is_the_identity_of_unit_variance_at_sigma_min(name: str, generator: torch.Generator) -> None:
    x = torch.randn(2, 3, 4, 4, generator=generator)
    base = read_preconditioning(ALL_TEACHERS[name])
    for sigma_min in (base.sigma_range[0], 0.02, 0.2):
        f = Denoiser(random_network, Boundary(base, "lcm", sigma_min))
        torch.testing.assert_close(f(x, sigma_min), x / (1 + sigma_min**2) ** 0.5, rtol=1e-6, atol=0)


@pytest.mark.parametrize("family", ["vp", "edm", "consistency"])
def test_boundary_is_the_identity_for_any_sigma_data(family: str, generator: torch.Generator) -> None:
    x = torch.randn(2, 3, 4, 4, generator=generator)
    for sigma_data in np.random.default_rng(0).uniform(0.1, 1.5, 30).tolist():
        fields = {"family": family, "sigma_data": sigma_data, "sigma_min": 0.02, "sigma_max": 80.0}
        base = preconditioning_from_config(fields)
        assert torch.equal(Denoiser(random_network, Boundary(base, "edm", 0.02))(x, 0.02), x), sigma_data


@pytest.mark.parametrize("name", [name for name in ALL_TEACHERS if not name.startswith("vp")])
def test_lcm_boundary_needs_a_vp_network(name: str) -> None:
    with pytest.raises(ValueError, match="variance-preserving"):
        Boundary(read_preconditioning(ALL_TEACHERS[name]), "lcm", 0.02)


@pytest.mark.parametrize("form", ["euler", "lcm"])
def test_consistency_network_allows_no_boundary_but_edm(form: str) -> None:
    with pytest.raises(ValueError, match=f"{form}|variance-preserving"):
        Boundary(CMPreconditioning(), form, 0.002)


def test_unknown_boundary_names_what_is_known() -> None:
    with pytest.raises(ValueError, match="edm, euler, lcm.*'heun'"):
        Boundary(EDMPreconditioning(), "heun", 0.002)


@pytest.mark.parametrize("name", [name for name, form in ALLOWED if form == "euler"])
def test_euler_boundary_is_one_euler_step_to_sigma_min(name: str, generator: torch.Generator) -> None:
    base, sigma_min = read_preconditioning(ALL_TEACHERS[name]), 0.02
    sigmas = sigmas_over(sigma_min, min(80.0, base.sigma_range[1]))
    x = noisy_batch(Gaussian(), sigmas, generator)
    sigma = sigmas.view(-1, 1, 1, 1)
    slope = (x - Denoiser(random_network, base)(x, sigmas)) / sigma
    f = Denoiser(random_network, Boundary(base, "euler", sigma_min))(x, sigmas)
    torch.testing.assert_close(f, x + (sigma_min - sigma) * slope, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", [name for name in ALL_TEACHERS if name != "consistency"])
def test_edm_boundary_is_the_papers_form_of_any_denoiser(name: str, generator: torch.Generator) -> None:
    """Whatever the family: read EDM's F off its D, and put it into the consistency parametrisation."""
    base, sigma_min, sigma_data = read_preconditioning(ALL_TEACHERS[name]), 0.02, 0.5
    sigmas = sigmas_over(sigma_min, min(80.0, base.sigma_range[1]))
    x = noisy_batch(Gaussian(), sigmas, generator)
    sigma = sigmas.view(-1, 1, 1, 1)
    width = (sigma**2 + sigma_data**2).sqrt()
    edm_f = (Denoiser(random_network, base)(x, sigmas) - sigma_data**2 / width**2 * x) * width / (sigma * sigma_data)
    skip, out = sigma_data**2 / ((sigma - sigma_min) ** 2 + sigma_data**2), sigma_data * (sigma - sigma_min) / width
    f = Denoiser(random_network, Boundary(base, "edm", sigma_min))(x, sigmas)
    torch.testing.assert_close(f, skip * x + out * edm_f, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("timestep", [0, 1, 19, 499, 999])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_lcm_boundary_is_the_stock_schedulers(prediction_type: str, timestep: int, generator: torch.Generator) -> None:
    stock = LCMScheduler(prediction_type=prediction_type)
    stock.set_timesteps(timesteps=[999, 499, 19, 1, 0])
    base = read_preconditioning(stock)
    sigma = float(((1 - stock.alphas_cumprod[timestep]) / stock.alphas_cumprod[timestep]).double() ** 0.5)
    x = Gaussian().draw((2, 3, 4, 4), generator) + sigma * torch.randn(2, 3, 4, 4, generator=generator)
    output = torch.randn(2, 3, 4, 4, generator=generator)
    expected = stock.step(output, torch.tensor(timestep), x / (1 + sigma**2) ** 0.5).denoised
    f = Denoiser(lambda *args, **kwargs: (output,), Boundary(base, "lcm", base.sigma_range[0]))(x, sigma)
    torch.testing.assert_close(f, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("form", "level"), [("edm", 0.02), ("euler", 0.02), ("lcm", 0.0)])
def test_level_at_which_a_boundary_answers(form: str, level: float) -> None:
    assert Boundary(read_preconditioning(DDPMScheduler()), form, 0.02).answer_level == level


# Time ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", VP_TEACHERS)
def test_time_of_sigma_inverts_sigma_of_time_on_the_table(schedule: str) -> None:
    base = read_preconditioning(VP_TEACHERS[schedule])
    timesteps = torch.arange(len(base.alphas_cumprod), dtype=torch.float64)
    torch.testing.assert_close(base.c_noise(base.sigma_from_c_noise(timesteps)), timesteps, rtol=0, atol=1e-6)


@pytest.mark.parametrize("schedule", VP_TEACHERS)
def test_time_of_sigma_inverts_sigma_of_time_between_the_table(schedule: str, generator: torch.Generator) -> None:
    base = read_preconditioning(VP_TEACHERS[schedule])
    last = len(base.alphas_cumprod) - 1
    timesteps = last * torch.rand(200, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(base.c_noise(base.sigma_from_c_noise(timesteps)), timesteps, rtol=0, atol=1e-6)


@pytest.mark.parametrize("schedule", VP_TEACHERS)
def test_sigma_of_time_is_the_schedulers_own(schedule: str) -> None:
    """Its table of alpha_bar, from the scheduler's own betas; the last may be infinite and is then clipped."""
    teacher = VP_TEACHERS[schedule]
    alpha_bar = teacher.alphas_cumprod.double().clone()
    if schedule == "zero_snr":
        assert alpha_bar[-1] == 0
        alpha_bar[-1] = 2.0**-24
    expected = ((1 - alpha_bar) / alpha_bar) ** 0.5
    sigmas = read_preconditioning(teacher).sigma_from_c_noise(torch.arange(len(alpha_bar)))
    torch.testing.assert_close(sigmas, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2", "trained_betas", "zero_snr"])
def test_sigma_range_is_the_euler_schedulers(schedule: str) -> None:
    euler = EulerDiscreteScheduler.from_config(VP_TEACHERS[schedule].config)
    expected = float(euler.sigmas[-2]), float(euler.sigmas[0])
    assert read_preconditioning(VP_TEACHERS[schedule]).sigma_range == pytest.approx(expected, rel=1e-4)


def test_time_of_sigma_stays_on_the_table_outside_its_range() -> None:
    base = read_preconditioning(DDPMScheduler())
    assert base.c_noise(torch.tensor([1e-4, 1e6])).tolist() == [0.0, 999.0]


def test_every_timestep_has_a_level_of_its_own_where_the_last_stands_for_infinity() -> None:
    """Linear betas at zero terminal SNR: three levels before the last lie above 2^12."""
    base = read_preconditioning(DDPMScheduler(rescale_betas_zero_snr=True))
    assert base.c_noise(base.log_sigmas[-5:].exp()).tolist() == pytest.approx([995, 996, 997, 998, 999])
    sigmas = torch.cat([torch.logspace(-2, 4, 500, dtype=torch.float64), base.log_sigmas[-3:].exp()]).sort().values
    times = base.c_noise(sigmas)
    assert times.isfinite().all()
    assert (times.diff() >= 0).all()


def test_several_zeros_of_alpha_bar_are_one_finite_level() -> None:
    base = read_preconditioning(DDPMScheduler(trained_betas=[0.01] * 998 + [1.0, 1.0]))
    assert base.sigma_range[1] == pytest.approx(4096, rel=1e-6)
    assert base.c_noise(torch.tensor([1.0, 4096.0])).isfinite().all()


@pytest.mark.parametrize(
    ("base", "sigma", "time"),
    [
        (EDMPreconditioning(), 0.5, 0.25 * np.log(0.5)),
        (CMPreconditioning(), 0.5, 250 * np.log(0.5)),
        (FlowPreconditioning(), 1.0, 500.0),
        (FlowPreconditioning(), 3.0, 750.0),
        (VEPreconditioning(), 17.0, 17.0),
    ],
)
def test_time_of_continuous_families(base: Preconditioning, sigma: float, time: float) -> None:
    assert float(base.c_noise(torch.tensor(sigma))) == pytest.approx(time)
    assert float(base.sigma_from_c_noise(torch.tensor(time, dtype=torch.float64))) == pytest.approx(sigma)


# Networks ------------------------------------------------------------------------------------------------------------


def test_predicted_variance_is_dropped(generator: torch.Generator) -> None:
    mean, variance = torch.randn(2, 1, 3, 4, 4, generator=generator)
    output = network_output(lambda *args, **kwargs: (torch.cat([mean, variance], 1),), mean, torch.tensor(0.0))
    assert torch.equal(output, mean)


def test_other_numbers_of_output_channels_are_refused() -> None:
    with pytest.raises(ValueError, match="maps 3 channels to 4"):
        network_output(lambda *args, **kwargs: (torch.zeros(1, 4, 8, 8),), torch.zeros(1, 3, 8, 8), torch.tensor(0.0))


def test_conditioning_reaches_the_network() -> None:
    def network(sample, timestep, return_dict, class_labels):
        return (class_labels.view(-1, 1, 1, 1).expand_as(sample).float(),)

    denoiser = Denoiser(network, VPPreconditioning(DDPMScheduler().alphas_cumprod, "sample"))
    denoised = denoiser(torch.zeros(2, 1, 2, 2), 1.0, class_labels=torch.tensor([3, 4]))
    assert denoised[:, 0, 0, 0].tolist() == [3.0, 4.0]


@pytest.mark.parametrize("sigma", [2.0, torch.tensor(2.0), torch.full((3,), 2.0), torch.full((3,), 2.0).double()])
def test_denoiser_takes_every_form_of_sigma(sigma: Any, generator: torch.Generator) -> None:
    x, denoiser = torch.randn(3, 2, 4, 4, generator=generator), Denoiser(random_network, EDMPreconditioning())
    expected = torch.cat([denoiser(x[i : i + 1], torch.tensor([2.0])) for i in range(3)])
    torch.testing.assert_close(denoiser(x, sigma), expected)


def test_denoiser_computes_in_float32_around_a_half_precision_network() -> None:
    seen = []

    class Network:
        dtype = torch.bfloat16

        def __call__(self, sample, timestep, return_dict):
            seen.append((sample.dtype, timestep.dtype))
            return (torch.zeros_like(sample),)

    denoised = Denoiser(Network(), EDMPreconditioning())(torch.ones(1, 1, 2, 2, dtype=torch.bfloat16), 0.5)
    assert seen == [(torch.bfloat16, torch.float32)]
    assert denoised.dtype == torch.float32


@pytest.mark.parametrize("scale", [0.0, 0.4, 1.0, 3.0])
def test_guided_denoiser_extrapolates_from_the_null_class(scale: float, generator: torch.Generator) -> None:
    def network(sample, timestep, return_dict, class_labels):
        return (torch.sin(sample * (1 + class_labels.view(-1, 1, 1, 1))),)

    denoiser, x = Denoiser(network, EDMPreconditioning()), torch.randn(2, 3, 4, 4, generator=generator)
    labels, sigma = torch.tensor([1, 2]), torch.tensor([0.5, 7.0])
    with_label = denoiser(x, sigma, class_labels=labels)
    with_null = denoiser(x, sigma, class_labels=torch.tensor([9, 9]))
    guided = GuidedDenoiser(denoiser, scale, without_class(9))(x, sigma, class_labels=labels)
    torch.testing.assert_close(guided, with_null + scale * (with_label - with_null), rtol=1e-5, atol=1e-5)


# Reading schedulers --------------------------------------------------------------------------------------------------


def stock_scheduler(name: str, **config: Any) -> Any:
    """A scheduler of diffusers; skips where an optional dependency of it is missing."""
    try:
        return getattr(diffusers, name)(**config)
    except ImportError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("name", sorted(VP_SCHEDULERS))
def test_every_vp_scheduler_is_read_with_its_own_betas(name: str) -> None:
    scheduler = stock_scheduler(name, beta_start=0.001, beta_end=0.015, beta_schedule="scaled_linear")
    base = read_preconditioning(scheduler)
    assert isinstance(base, VPPreconditioning)
    assert base.prediction_type == "epsilon"
    torch.testing.assert_close(base.alphas_cumprod, scheduler.alphas_cumprod, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("names", "family"),
    [
        (EDM_SCHEDULERS, EDMPreconditioning),
        (FLOW_SCHEDULERS, FlowPreconditioning),
        ({"CMStochasticIterativeScheduler"}, CMPreconditioning),
        ({"ScoreSdeVeScheduler"}, VEPreconditioning),
    ],
)
def test_every_other_scheduler_is_read_as_its_family(names: set[str], family: type) -> None:
    assert {type(read_preconditioning(stock_scheduler(name))) for name in names} == {family}


def test_every_supported_scheduler_is_tested_here() -> None:
    others = {"CMStochasticIterativeScheduler", "ScoreSdeVeScheduler", "ConsistencyScheduler", SCALED_TIME_SCHEDULER}
    assert SUPPORTED_SCHEDULERS == VP_SCHEDULERS | EDM_SCHEDULERS | FLOW_SCHEDULERS | others


@pytest.mark.parametrize("factory", [EDMEulerScheduler, CMStochasticIterativeScheduler, ScoreSdeVeScheduler])
def test_sigma_range_of_continuous_families_is_the_configs(factory: Callable[..., Any]) -> None:
    base = read_preconditioning(factory(sigma_min=0.03, sigma_max=42.0))
    assert base.sigma_range == (0.03, 42.0)


@pytest.mark.parametrize("factory", [EDMEulerScheduler, CMStochasticIterativeScheduler])
def test_sigma_data_is_the_configs(factory: Callable[..., Any]) -> None:
    assert read_preconditioning(factory(sigma_data=0.66)).sigma_data == 0.66


def test_config_is_read_like_the_scheduler() -> None:
    config = {"_class_name": "DDPMScheduler", "prediction_type": "v_prediction", "num_train_timesteps": 200}
    base = read_preconditioning(config)
    assert base.prediction_type == "v_prediction"
    assert len(base.alphas_cumprod) == 200


def test_flow_sigmas_are_flow_matching() -> None:
    scheduler = DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction")
    assert isinstance(read_preconditioning(scheduler), FlowPreconditioning)


def test_unknown_scheduler_is_named_beside_the_supported() -> None:
    with pytest.raises(ValueError, match="'UnCLIPScheduler' is not supported.*DDPMScheduler"):
        read_preconditioning(stock_scheduler("UnCLIPScheduler"))


@pytest.mark.parametrize(
    ("teacher", "supported"),
    [(DDPMScheduler, "epsilon, v_prediction, sample"), (EDMEulerScheduler, "epsilon, v_prediction")],
)
def test_unknown_prediction_type_is_named_beside_the_supported(teacher: type, supported: str) -> None:
    with pytest.raises(ValueError, match=f"prediction_type='noise'.*{supported}"):
        describe_network({**teacher().config, "_class_name": teacher.__name__, "prediction_type": "noise"})


def test_edm_network_that_predicts_samples_is_refused() -> None:
    config = {**stock_scheduler("EDMDPMSolverMultistepScheduler").config, "prediction_type": "sample"}
    with pytest.raises(ValueError, match="prediction_type='sample'.*epsilon, v_prediction"):
        describe_network({**config, "_class_name": "EDMDPMSolverMultistepScheduler"})


def test_continuous_timesteps_are_refused() -> None:
    scheduler = EulerDiscreteScheduler(timestep_type="continuous", prediction_type="v_prediction")
    with pytest.raises(ValueError, match="timestep_type='continuous'.*'discrete'"):
        read_preconditioning(scheduler)


def test_inverted_flow_is_refused() -> None:
    with pytest.raises(ValueError, match="invert_sigmas"):
        read_preconditioning(FlowMatchEulerDiscreteScheduler(invert_sigmas=True))


def test_unknown_family_names_what_is_known() -> None:
    with pytest.raises(ValueError, match="vp, edm, consistency, flow, ve, got 'gan'"):
        preconditioning_from_config({"family": "gan", "sigma_min": 0.002, "sigma_max": 80.0})


@pytest.mark.parametrize(("family", "prediction_type"), [("vp", "noise"), ("edm", "sample"), ("edm", "noise")])
def test_prediction_type_that_a_family_lacks_is_refused(family: str, prediction_type: str) -> None:
    fields = {"family": family, "prediction_type": prediction_type, "sigma_min": 0.002, "sigma_max": 80.0}
    with pytest.raises(ValueError, match=f"'{family}' has `prediction_type='{prediction_type}'"):
        preconditioning_from_config(fields)


def test_something_else_than_a_scheduler_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="str"):
        read_preconditioning("DDPMScheduler")
