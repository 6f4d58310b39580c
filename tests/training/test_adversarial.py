"""What lets a student see real images: the adversarial term, and a part of each batch."""

from contextlib import nullcontext
from types import SimpleNamespace

import diffusers
import pytest
import torch
import torch.nn.functional as F
from accelerate.state import AcceleratorState
from conftest import build_unet
from test_methods import make_trainer, sample, weights

from cm_diffusers.noise_levels import GridLevels
from cm_diffusers.solvers import euler_step
from cm_diffusers.training import ConsistencyConfig
from cm_diffusers.training.companions import Companion
from cm_diffusers.training.distances import l2
from cm_diffusers.training.objectives import Losses
from cm_diffusers.training.objectives.adversarial import Adversarial, Discriminator, feature_channels, features
from cm_diffusers.training.objectives.pairs import FromTeacher, PairObjective, PartlyFromData, from_data, uniform
from cm_diffusers.training.preparation import prepare_teacher
from cm_diffusers.training.randomness import SampleRandom
from cm_diffusers.training.teacher import Teacher
from cm_diffusers.training.tracking import Meter

IMAGES = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """accelerate keeps its precision for the life of a process."""
    AcceleratorState._reset_state(reset_partial_state=True)


def random():
    return SampleRandom(torch.arange(6), torch.device("cpu"))


class Shifted:
    """An objective whose student adds a weight of its own to the images."""

    def __init__(self):
        self.shift = torch.nn.Parameter(torch.full((1,), 0.3))

    def losses(self, images, step, random, **conditioning):
        return Losses(torch.zeros(len(images)) + 0 * self.shift, torch.ones(len(images)), images + self.shift)


def adversarial(weight=1.0):
    teacher = Teacher(build_unet().requires_grad_(False), diffusers.EDMEulerScheduler(), "tiny")
    torch.manual_seed(0)
    student = Shifted()
    return Adversarial(student, Discriminator(feature_channels(teacher)), teacher, weight, 0.002, 80.0), student


def test_each_term_trains_its_own_network():
    """The student against a constant head, and the head on constant images, from one backward pass."""
    objective, student = adversarial(weight=2.0)
    objective.losses(IMAGES, 0, random()).values.sum().backward()
    student_gradient, head = student.shift.grad.clone(), objective.discriminator
    head_gradient = weights_of_gradients(head)

    again = random()
    sigma = torch.exp(-0.4 + 1.2 * torch.special.ndtri(again.uniform())).float()  # hardly cut off at the ends
    noise = sigma.view(-1, 1, 1, 1) * again.normal_like(IMAGES)

    def logits(images):
        family = objective.teacher.preconditioning
        return head(features(objective.teacher.unet, family, images + noise, sigma))

    head.zero_grad()
    student.shift.grad = None
    (2.0 * F.softplus(-logits(IMAGES + student.shift)).sum()).backward()
    torch.testing.assert_close(student_gradient, student.shift.grad, rtol=1e-3, atol=1e-5)
    head.zero_grad()
    (F.softplus(-logits(IMAGES)) + F.softplus(logits(IMAGES + student.shift.detach()))).sum().backward()
    torch.testing.assert_close(head_gradient, weights_of_gradients(head), rtol=1e-3, atol=1e-5)


def weights_of_gradients(network):
    return torch.cat([weight.grad.flatten() for weight in network.parameters()])


def test_a_head_that_has_learned_pulls_the_student_to_the_images():
    objective, student = adversarial()
    optimizer = torch.optim.Adam(objective.discriminator.parameters(), lr=1e-2)
    for step in range(200):
        if step == 150:
            student.shift.grad = None
        losses = objective.losses(IMAGES, 0, SampleRandom(torch.arange(6) + 6 * step, IMAGES.device)).values
        optimizer.zero_grad()
        losses.mean().backward()
        optimizer.step()
    assert float(student.shift.grad) / 50 > 0.1  # its images are too bright, and the head has found out


@pytest.mark.parametrize("method", ["cd", "scd"])
def test_a_run_with_both_terms_resumes_to_the_same_bits(method, tmp_path):
    options = {"adversarial_weight": 0.1, "real_data": 0.3, "checkpoint_steps": 4}
    whole = make_trainer(tmp_path / "whole", method, **options)
    pipeline = whole.train()
    assert sample(pipeline, num_inference_steps=1).isfinite().all()
    (tmp_path / "again").mkdir()
    (tmp_path / "whole" / "checkpoints").rename(tmp_path / "again" / "checkpoints")
    for folder in sorted((tmp_path / "again" / "checkpoints").iterdir())[1:]:
        folder.rename(tmp_path / folder.name)
    resumed = make_trainer(tmp_path / "again", method, **options, resume="auto")
    start = weights(resumed.companions["discriminator"].module)
    resumed.train()
    assert torch.equal(weights(whole.unet), weights(resumed.unet))
    for name, companion in whole.companions.items():
        assert torch.equal(weights(companion.module), weights(resumed.companions[name].module))
    assert not torch.equal(start, weights(whole.companions["discriminator"].module))


def test_its_losses_are_logged_apart():
    logged = {}
    accelerator = SimpleNamespace(
        device=IMAGES.device, reduce=lambda tensor, _: tensor, log=lambda values, step: logged.update(values)
    )
    losses = Losses(torch.ones(2), torch.ones(2), IMAGES, {"discriminator": torch.tensor([1.0, 3.0])})
    infinite = losses._replace(terms={"discriminator": torch.tensor([torch.inf, 8.0])})
    meter = Meter(accelerator, batch_size=2, sigma_range=(0.02, 80.0))
    for found in (losses, infinite):
        meter.add_losses(found)
        meter.add_step(torch.ones(()))
    meter.log("cd", 2, {"lr": 0.1}, SimpleNamespace(set_postfix=lambda _: None))
    assert (logged["cd/loss"], logged["cd/loss_of/discriminator"]) == (1.0, 4.0)

    objective, _ = adversarial(weight=2.0)
    found = objective.losses(IMAGES, 0, random())
    parts = found.terms
    torch.testing.assert_close(found.values, parts["method"] + 2 * parts["adversarial"] + parts["discriminator"])


@pytest.mark.parametrize("overflows", [False, True])
def test_a_head_under_a_loss_scale_steps_or_halves_it(overflows):
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    head = torch.nn.Linear(1, 1, bias=False)
    companion = Companion(head, SimpleNamespace(device=IMAGES.device, scaler=scaler, num_processes=1), 1e-3)
    before = weights(head).clone()
    scaler.scale(head(torch.ones(1, 1)).sum()).backward()
    if overflows:
        head.weight.grad *= torch.inf
    companion.step(torch.tensor(False))
    scaler.update()
    assert scaler.get_scale() == (512.0 if overflows else 1024.0)
    torch.testing.assert_close(weights(head), before - (0.0 if overflows else 1e-3))  # Adam's first step is its rate


# Real data -----------------------------------------------------------------------------------------------------------


def lower_points(source):
    f = lambda x, sigma, **conditioning: x  # noqa: E731
    f.network = None
    seen = {}

    def spy(x, sigma):
        seen["lower"] = x
        return x

    PairObjective(f, spy, GridLevels(lambda step: 6, 0.02, 10.0), source, l2, uniform).losses(IMAGES, 0, random())
    return seen["lower"]


def test_a_part_of_the_batch_comes_from_the_data():
    teacher = FromTeacher(lambda x, sigma: x * 0, euler_step)
    real, taught = lower_points(from_data), lower_points(teacher)
    mixed = lower_points(PartlyFromData(teacher, 0.5))
    own = [bool(torch.equal(m, r)) for m, r in zip(mixed, real, strict=True)]
    assert 0 < sum(own) < 6
    for is_real, m, t in zip(own, mixed, taught, strict=True):
        assert is_real or torch.equal(m, t)
    assert torch.equal(lower_points(PartlyFromData(teacher, 1.0)), real)


@pytest.mark.parametrize(("precision", "refused"), [(None, True), ("bf16", True), ("fp16", False)])
def test_a_gradient_through_half_precision_needs_a_scale(precision, refused):
    config = ConsistencyConfig(method="scd", adversarial_weight=0.1, teacher_dtype="float16").resolve()
    expected = pytest.raises(ValueError, match="needs `mixed_precision='fp16'`") if refused else nullcontext()
    with expected:
        prepare_teacher(config, (build_unet(), diffusers.DDPMScheduler()), precision or "no")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "ct", "real_data": 0.1}, "needs `source='teacher'`"),
        ({"real_data": 1.5}, "`real_data` must be in"),
        ({"adversarial_weight": -1.0}, "`adversarial_weight` must be at least 0"),
    ],
)
def test_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ConsistencyConfig(**options).resolve()
