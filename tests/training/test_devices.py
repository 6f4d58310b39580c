"""Losses on an accelerator, without one: fake tensors carry a device and a dtype, and refuse to mix devices.

What is computed on them can be watched, too: nothing may make the host wait for the device.
"""

import functools
from types import SimpleNamespace

import diffusers
import pytest
import torch
from conftest import build_unet
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from cm_diffusers import ConsistencyConfig
from cm_diffusers.network_config import read_preconditioning
from cm_diffusers.noise_levels import GridLevels, lognormal_sigmas
from cm_diffusers.preconditioning import Boundary, Denoiser, EDMPreconditioning
from cm_diffusers.solvers import heun_step
from cm_diffusers.training.distances import build_distance
from cm_diffusers.training.health import StepRecord, Watch
from cm_diffusers.training.objectives import Losses
from cm_diffusers.training.objectives.adversarial import Adversarial, Discriminator, feature_channels
from cm_diffusers.training.objectives.conversion import ConversionObjective
from cm_diffusers.training.objectives.pairs import FromTeacher, PairObjective, inverse_gap
from cm_diffusers.training.objectives.tangents import (
    DERIVATIVES,
    ConsistencyJumps,
    FlowMapJumps,
    NormalizedTangent,
    TangentObjective,
    WarmUp,
)
from cm_diffusers.training.optimizers import make_optimizer, set_learning_rate, take_step
from cm_diffusers.training.randomness import SampleRandom
from cm_diffusers.training.student import make_student
from cm_diffusers.training.teacher import Teacher

TEACHERS = {
    "vp": diffusers.DDPMScheduler(),
    "vp, v": diffusers.DDIMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True),
    "edm": diffusers.EDMEulerScheduler(),
    "flow": diffusers.FlowMatchEulerDiscreteScheduler(),
    "ve": diffusers.ScoreSdeVeScheduler(),
    "consistency": diffusers.CMStochasticIterativeScheduler(),
}


class Waits(TorchDispatchMode):
    """The operations that make the host wait for a GPU."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        target, name = kwargs.get("device"), function.name()
        here = {a.device.type for a in args if isinstance(a, torch.Tensor)}
        # Shapes of derivatives are worked out on the meta device, which holds no numbers.
        crosses = target is not None and here and torch.device(target).type not in here | {"meta"}
        if (name.startswith(("aten::_local_scalar_dense", "aten::nonzero", "aten::equal")) and here == {"cuda"}) or (
            crosses and not kwargs.get("non_blocking")
        ):
            self.found.append(name)
        return function(*args, **kwargs)


def test_waits_are_seen():
    with FakeTensorMode(), Waits() as waits:
        torch.zeros(2).to("cuda", non_blocking=True)
        assert waits.found == []
        torch.zeros(2).to("cuda")
        assert len(waits.found) == 1
        with pytest.raises(DataDependentOutputException):
            torch.zeros((), device="cuda").item()
        assert len(waits.found) == 2


@pytest.mark.parametrize("distance", ["l1", "l2", "pseudo_huber"])
@pytest.mark.parametrize("family", TEACHERS)
def test_losses_stay_on_the_device_of_the_images_and_wait_for_nothing(family, distance, monkeypatch):
    _, scheduler = make_student(build_unet(), TEACHERS[family], convert=True)
    teacher, student, boundary = read_preconditioning(TEACHERS[family]), scheduler.preconditioning, scheduler.boundary
    for scalings in (teacher, student, boundary):
        scalings.scalings(torch.tensor([1.0]))  # tables are made once, of real numbers
    levels = GridLevels(lambda step: 6, scheduler.config.sigma_min, scheduler.config.sigma_max)

    randoms = [SampleRandom(torch.arange(4), torch.device("cuda")) for _ in range(2)]
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device("cuda"):
        network, images = build_unet(), torch.zeros(4, 3, 8, 8)
        with torch.device("cpu"):
            denoise, f = Denoiser(network, teacher), Denoiser(network, boundary)
            metric = build_distance(distance, None, (-1.0, 1.0), images.device)
            pairs = PairObjective(f, f, levels, FromTeacher(denoise, heun_step), metric, inverse_gap)
            conversion = ConversionObjective(Denoiser(network, student), denoise, levels.sigma_min, levels.sigma_max)
            for objective, random in zip((pairs, conversion), randoms, strict=True):
                with Waits() as waits:
                    losses = objective.losses(images, 0, random)
                assert losses.values.device.type == "cuda"
                assert losses.values.dtype == torch.float32
                assert waits.found == []


@pytest.mark.parametrize("derivative", DERIVATIVES.values(), ids=DERIVATIVES)
@pytest.mark.parametrize("flow_map", [False, True])
def test_tangents_stay_on_the_device_of_the_images_and_wait_for_nothing(flow_map, derivative, monkeypatch):
    family = EDMPreconditioning()
    sigmas = functools.partial(lognormal_sigmas, p_mean=-1.0, p_std=1.4, low=0.002, high=80.0)
    jumps = ConsistencyJumps(Boundary(family, "edm", 0.002), sigmas)
    if flow_map:
        jumps = FlowMapJumps(family, 0.002, sigmas)
    random = SampleRandom(torch.arange(4), torch.device("cuda"))
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device("cuda"):
        network, images = build_unet(class_embed_type="timestep" if flow_map else None), torch.zeros(4, 3, 8, 8)
        with torch.device("cpu"):
            objective = TangentObjective(
                network, network, family, jumps, None, derivative, NormalizedTangent(), WarmUp(5), real_data=0.5
            )
            with Waits() as waits:
                losses = objective.losses(images, 0, random)
            assert losses.values.device.type == losses.denoised.device.type == "cuda"
            assert losses.values.dtype == torch.float32
            assert waits.found == []


def test_the_adversarial_term_waits_for_nothing(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    random = SampleRandom(torch.arange(4), torch.device("cuda"))
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device("cuda"):
        teacher, images = Teacher(build_unet(), diffusers.EDMEulerScheduler(), "tiny"), torch.zeros(4, 3, 8, 8)
        head = Discriminator(feature_channels(teacher))
        with torch.device("cpu"):
            student = SimpleNamespace(losses=lambda images, *_: Losses(images.mean((1, 2, 3)), torch.ones(4), images))
            with Waits() as waits:
                losses = Adversarial(student, head, teacher, 0.1, 0.002, 80.0).losses(images, 0, random)
    assert losses.values.device.type == "cuda"
    assert waits.found == []


def test_the_watch_waits_for_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "Event", lambda: SimpleNamespace(record=lambda: None, synchronize=lambda: None))
    watch = Watch(SimpleNamespace(num_processes=1, scaler=None), tmp_path, 3)
    with FakeTensorMode(), Waits() as waits:
        norm = torch.ones((), device="cuda")
        watch.after(StepRecord(0, [], norm[None], norm, ~norm.isfinite(), {}))
        assert watch._pending is not None
    assert waits.found == []


@pytest.mark.parametrize("name", ["radam", "adam", "adamw"])
def test_the_optimizer_waits_for_nothing(name):
    config = ConsistencyConfig(optimizer=name, weight_decay=0.1)
    with FakeTensorMode(), Waits() as waits:
        network = torch.nn.Linear(4, 4, device="cuda")
        optimizer = make_optimizer(config, network)
        for step in range(8):
            for weight in network.parameters():
                weight.grad = torch.zeros_like(weight)
            set_learning_rate(optimizer, config, 1e-3, step)
            norm = torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            prepared = SimpleNamespace(optimizer=optimizer, scaler=None, step=optimizer.step)
            take_step(prepared, ~norm.isfinite())
    assert waits.found == []
