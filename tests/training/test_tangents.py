"""Continuous levels: against independent formulas, and on problems whose consistency function is known."""

import math
from types import SimpleNamespace

import pytest
import torch
from closed_form import Gaussian, Mixture
from conftest import build_unet
from pixels import SIGMA_MAX, SIGMA_MIN, PixelNetwork, error, ode_solution, train
from torch import nn
from torch.autograd import forward_ad

from cm_diffusers.networks import network_output
from cm_diffusers.noise_levels import lognormal_sigmas
from cm_diffusers.preconditioning import (
    Boundary,
    CMPreconditioning,
    Denoiser,
    EDMPreconditioning,
    FlowPreconditioning,
    VPPreconditioning,
)
from cm_diffusers.solvers import euler_step
from cm_diffusers.training.objectives.tangents import (
    ConsistencyJumps,
    FlowMapJumps,
    Jump,
    NormalizedTangent,
    PowerNormalizedTangent,
    TangentObjective,
    WarmUp,
    finite_difference,
    forward_mode,
)
from cm_diffusers.training.randomness import SampleRandom

VP = VPPreconditioning(torch.linspace(1 - 1e-4, 1 - 0.02, 1000).cumprod(0), "v_prediction")
FAMILIES = [EDMPreconditioning(), CMPreconditioning(), VP, FlowPreconditioning()]


def identity(tangent):
    return tangent


def fully(step):
    return 1.0


class Fixed:
    """Jumps from given levels."""

    def __init__(self, sigma, function, **conditioning):
        self.jump = Jump(sigma, function, conditioning)

    def draw(self, random):
        return self.jump


def objective(network, family, function, sigma, teacher, normalize=identity, warm_up=fully, derivative=forward_mode):
    jumps = Fixed(sigma, function)
    return TangentObjective(network, network, family.denoising, jumps, teacher, derivative, normalize, warm_up)


def random_of(count):
    return SampleRandom(torch.arange(count) + 7, torch.device("cpu"))


def gradient(network, loss):
    network.zero_grad()
    loss.backward()
    return torch.cat([weight.grad.flatten() for weight in network.parameters()]).clone()


# The network's derivative ---------------------------------------------------------------------------


def inputs(dtype):
    generator = torch.Generator().manual_seed(0)
    sample, along = (torch.randn(3, 3, 8, 8, generator=generator, dtype=dtype) for _ in range(2))
    return sample, torch.tensor([-1.2, 0.1, 1.0], dtype=dtype), along, torch.tensor([0.3, -0.5, 1.0], dtype=dtype)


def attentive_unet(dropout=0.0):
    torch.manual_seed(0)
    return build_unet(down_block_types=("AttnDownBlock2D",), dropout=dropout)


def test_forward_mode_is_the_derivative_of_a_unet_with_attention():
    network = attentive_unet().double().eval()
    sample, time, along, rate = inputs(torch.float64)

    def at(h):
        return network_output(network, sample + h * along, time + h * rate)

    h = 0.02  # the UNet computes its time embedding in float32
    with torch.no_grad():
        expected = (8 * (at(h) - at(-h)) - (at(2 * h) - at(-2 * h))) / (12 * h)
        found = forward_mode(network, sample, time, along, rate)
    assert (found - expected).norm() < 1e-4 * expected.norm()


@pytest.mark.parametrize("rate", [1.0, 200.0])
def test_finite_difference_is_forward_mode_up_to_rounding(rate):
    network = attentive_unet().eval()
    sample, time, along, _ = inputs(torch.float32)
    time, change = 300 + 100 * time, rate * torch.ones(3)
    with torch.no_grad():
        exact = forward_mode(network, sample, time, along, change)
        found = finite_difference(network, sample, time, along, change)
    assert (found - exact).norm() < 2e-3 * exact.norm()


@pytest.mark.parametrize("derivative", [forward_mode, finite_difference])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_the_derivative_has_the_dropout_mask_of_the_pass_after_it(derivative, memory_format):
    class Dropped(nn.Module):
        def __init__(self):
            super().__init__()
            self.dropout = nn.Dropout(0.5)

        def forward(self, sample, time, return_dict=False):
            return (self.dropout(sample),)

    network, images = Dropped(), torch.randn(4, 3, 8, 8).contiguous(memory_format=memory_format)
    seen = {}

    def spy(network, sample, *rest, **conditioning):
        seen["masked"] = derivative(network, sample, *rest, **conditioning) == 0
        return torch.zeros_like(sample)

    sigma = torch.full((4,), 1.0)
    losses = objective(network, FAMILIES[0], Boundary(FAMILIES[0], "edm", 0.002), sigma, None, derivative=spy).losses(
        images, 0, random_of(4)
    )
    c_skip = 1 / (1 + ((1 - 0.002) / 0.5) ** 2)
    sample = images + SampleRandom(torch.arange(4) + 7, images.device).normal_like(images)
    assert torch.equal((losses.denoised - c_skip * sample).abs() < 1e-6, seen["masked"])


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_unet_with_dropout_is_the_same_one_in_the_derivative_and_after_it(memory_format):
    network = attentive_unet(dropout=0.3).train().to(memory_format=memory_format)
    outputs = []

    def keep(module, inputs, output):
        outputs.append(forward_ad.unpack_dual(output[0]).primal.detach())

    network.register_forward_hook(keep)
    images, sigma = torch.randn(4, 3, 8, 8).contiguous(memory_format=memory_format), torch.full((4,), 1.0)
    objective(network, FAMILIES[0], Boundary(FAMILIES[0], "edm", 0.002), sigma, None).losses(images, 0, random_of(4))
    inside, after = outputs
    torch.testing.assert_close(inside, after, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_dropout_is_the_same_where_activations_are_computed_again(memory_format):
    gradients = []
    for checkpointed in (False, True):
        network = attentive_unet(dropout=0.3).train().to(memory_format=memory_format)
        tangents = objective(network, FAMILIES[0], Boundary(FAMILIES[0], "edm", 0.002), torch.full((4,), 1.0), None)
        if checkpointed:
            network.enable_gradient_checkpointing()
        torch.manual_seed(0)
        images = torch.randn(4, 3, 8, 8).contiguous(memory_format=memory_format)
        gradients.append(gradient(network, tangents.losses(images, 0, random_of(4)).values.sum()))
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-4 * gradients[0].abs().max().item())


def test_differences_are_taken_without_tf32(monkeypatch):
    matmul, cudnn, seen = SimpleNamespace(allow_tf32=True), SimpleNamespace(allow_tf32=True), []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cuda, "matmul", matmul)
    monkeypatch.setattr(torch.backends, "cudnn", cudnn)

    def network(sample, time, return_dict=False):
        seen.extend([matmul.allow_tf32, cudnn.allow_tf32])
        return (sample,)

    finite_difference(network, *[torch.ones(2, 1, 2, 2), torch.ones(2)] * 2)
    assert seen == [False] * 4
    assert matmul.allow_tf32 and cudnn.allow_tf32


# The objective's formula ---------------------------------------------------------------------------


@pytest.mark.parametrize("data", [False, True], ids=["teacher", "data"])
def test_the_tangent_of_an_edm_network_is_sCMs_in_trigflow_time(data):
    """Against Lu & Song's own expression, with its warm-up, its time t and its data of scale sigma_data."""
    problem, sigma_data, warm = Gaussian(), 0.5, 0.3
    network = PixelNetwork().double()
    family = EDMPreconditioning(sigma_data=sigma_data)
    sigma = torch.tensor([0.05, 0.7, 4.0, 60.0], dtype=torch.float64)
    images = problem.draw((4, 1, 1, 1), torch.Generator().manual_seed(0), dtype=torch.float64)
    teacher = None if data else problem.denoise
    found = objective(network, family, family, sigma, teacher, warm_up=lambda step: warm).losses(
        images, 0, random_of(4)
    )

    def predict(x_over_scale, t):  # TrigFlow's F: EDM's with the other sign
        return -network_output(network, x_over_scale, (torch.tan(t) * sigma_data).log() / 4)

    noise = random_of(4).normal_like(images)
    t = torch.atan(sigma / sigma_data).view(-1, 1, 1, 1)
    z = sigma_data * noise
    x_t = torch.cos(t) * images + torch.sin(t) * z
    x = images + sigma.view(-1, 1, 1, 1) * noise
    if data:
        velocity = torch.cos(t) * z - torch.sin(t) * images
    else:
        velocity = (torch.cos(t) * x_t - problem.denoise(x, sigma)) / torch.sin(t)
    scale = torch.cos(t) * torch.sin(t)
    tangents = scale * velocity / sigma_data, scale.flatten()
    output, change = torch.func.jvp(predict, (x_t / sigma_data, t.flatten()), tangents)
    g = -(torch.cos(t) ** 2) * (sigma_data * output - velocity) - warm * (scale * x_t + sigma_data * change)
    # In units of the output, and squared, as |F - F_ - g|^2 is where F = F_.
    torch.testing.assert_close(found.values, (g / sigma_data).square().flatten(1).mean(1), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: type(family).__name__)
def test_the_gradient_is_the_limit_of_distillations(family):
    """CD's gradient over the gap of ln sigma, as the gap shrinks; in units of the output, as the tangent's is."""
    torch.manual_seed(1)
    problem, network = Gaussian(), PixelNetwork(time_scale=float(family.c_noise(torch.tensor(2.0)))).double()
    function = Boundary(family, "edm" if isinstance(family, CMPreconditioning) else "euler", 0.02)
    level = torch.tensor([1.3], dtype=torch.float64)
    sigma = level.expand(64)
    images = problem.draw((64, 1, 1, 1), torch.Generator().manual_seed(0), dtype=torch.float64)
    limit = gradient(
        network,
        objective(network, family, function, sigma, problem.denoise).losses(images, 0, random_of(64)).values.mean(),
    )
    f = Denoiser(network, function)
    sample = images + 1.3 * random_of(64).normal_like(images)
    units = function.scalings(level).c_out * family.denoising.output_scalings(level)[1]
    errors = []
    for gap in (0.1, 0.01, 0.001):
        lower = sigma * math.exp(-gap)
        with torch.no_grad():
            target = f(euler_step(problem.denoise, sample, sigma, lower), lower)
        loss = (f(sample, sigma) - target).square().mean() / gap / units
        errors.append(float((gradient(network, loss) - limit).norm() / limit.norm()))
    assert errors[2] < 5e-3
    assert errors[1] / errors[2] > 8  # of first order


def test_normalized_tangents():
    tangent = torch.tensor([[3.0, 4.0], [0.3, -0.4]]).view(2, 1, 1, 2)
    norm = torch.tensor([5.0, 0.5]).view(2, 1, 1, 1)
    torch.testing.assert_close(NormalizedTangent()(tangent), 2**0.5 * tangent / (norm + 0.1))
    size = norm / 2**0.5
    torch.testing.assert_close(PowerNormalizedTangent()(tangent), tangent / (size**2 + 1e-3) ** 0.75)


def test_normalized_tangents_of_large_images_are_not_smaller():
    small = torch.ones(1, 1, 2, 2)
    for normalize in (NormalizedTangent(), PowerNormalizedTangent()):
        assert normalize(small)[0, 0, 0, 0] <= normalize(small.repeat(1, 3, 8, 8))[0, 0, 0, 0]


def test_warm_up():
    assert [WarmUp(4)(step) for step in (0, 1, 4, 9)] == [0, 0.25, 1, 1]
    assert WarmUp(0)(0) == 1


# Convergence ---------------------------------------------------------------------------


def pixel_objective(teacher, flow_map=False):
    family = EDMPreconditioning((SIGMA_MIN, SIGMA_MAX), sigma_data=0.6)

    def sigmas(position):
        return lognormal_sigmas(position, 0.0, 1.6, SIGMA_MIN, SIGMA_MAX)

    def build(network):
        jumps = FlowMapJumps(family, SIGMA_MIN, sigmas)
        if not flow_map:
            jumps = ConsistencyJumps(Boundary(family, "edm", SIGMA_MIN), sigmas)
        return TangentObjective(
            network, network, family, jumps, teacher, forward_mode, NormalizedTangent(), WarmUp(200)
        )  # fmt: skip

    return build


@pytest.mark.parametrize("data", [False, True], ids=["scd", "sct"])
def test_continuous_consistency_reaches_that_of_a_gaussian(data):
    problem = Gaussian()
    network = train(pixel_objective(None if data else problem.denoise), problem, steps=800 if data else 500, batch=128)
    f = Denoiser(network, Boundary(EDMPreconditioning((SIGMA_MIN, SIGMA_MAX), 0.6), "edm", SIGMA_MIN))
    assert error(f, lambda x, s: problem.consistency(x, s, SIGMA_MIN), problem) < (0.15 if data else 0.05)


def test_continuous_consistency_reaches_that_of_a_mixture():
    problem = Mixture()
    network = train(pixel_objective(problem.denoise), problem, steps=1200)
    f = Denoiser(network, Boundary(EDMPreconditioning((SIGMA_MIN, SIGMA_MAX), 0.6), "edm", SIGMA_MIN))
    # 0.07 to 0.18 over ten seeds; for the posterior mean, which a diffusion model says in one step, 0.42.
    assert error(f, ode_solution(problem), problem) < 0.2


def test_a_flow_map_reaches_every_lower_level_of_a_gaussian():
    problem, family = Gaussian(), EDMPreconditioning((SIGMA_MIN, SIGMA_MAX), 0.6)
    network = train(pixel_objective(problem.denoise, flow_map=True), problem, steps=500, batch=128)
    for lower in (SIGMA_MIN, 0.5):
        told = family.c_noise(torch.tensor([lower])).float()

        def jump(x, sigma, lower=lower, told=told):
            boundary = Boundary(family, "euler", lower)
            return Denoiser(network, boundary)(x, sigma, class_labels=told.expand(len(x)))

        truth = lambda x, s, lower=lower: problem.consistency(x, s, lower)  # noqa: E731
        assert error(jump, truth, problem, levels=(1.5, SIGMA_MAX)) < 0.06
