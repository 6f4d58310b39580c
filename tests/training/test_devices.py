"""Losses on an accelerator, without one: fake tensors carry a device and a dtype, and refuse to mix devices."""

import diffusers
import pytest
import torch
from conftest import build_unet
from torch._subclasses.fake_tensor import FakeTensorMode

from cm_diffusers.noise_levels import Levels
from cm_diffusers.preconditioning import Denoiser, read_preconditioning
from cm_diffusers.training.distances import build_distance
from cm_diffusers.training.objectives.conversion import ConversionObjective
from cm_diffusers.training.objectives.pairs import FromTeacher, PairObjective, inverse_gap
from cm_diffusers.training.solvers import heun_step
from cm_diffusers.training.student import make_student

TEACHERS = {
    "vp": diffusers.DDPMScheduler(),
    "vp, v": diffusers.DDIMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True),
    "edm": diffusers.EDMEulerScheduler(),
    "flow": diffusers.FlowMatchEulerDiscreteScheduler(),
    "ve": diffusers.ScoreSdeVeScheduler(),
    "consistency": diffusers.CMStochasticIterativeScheduler(),
}


@pytest.mark.parametrize("distance", ["l1", "l2", "pseudo_huber"])
@pytest.mark.parametrize("family", TEACHERS)
def test_losses_stay_on_the_device_of_the_images(family, distance):
    _, scheduler = make_student(build_unet(), TEACHERS[family], convert=True)
    teacher, student, boundary = read_preconditioning(TEACHERS[family]), scheduler.preconditioning, scheduler.boundary
    for scalings in (teacher, student, boundary):
        scalings.scalings(torch.tensor([1.0]))  # tables are made once, of real numbers
    levels = Levels(lambda step: 6, scheduler.config.sigma_min, scheduler.config.sigma_max)

    with FakeTensorMode(allow_non_fake_inputs=True), torch.device("cuda"):
        network, images = build_unet(), torch.zeros(4, 3, 8, 8)
        with torch.device("cpu"):
            denoise, f = Denoiser(network, teacher), Denoiser(network, boundary)
            metric = build_distance(distance, None, (-1.0, 1.0), images.device)
            pairs = PairObjective(f, f, levels, FromTeacher(denoise, heun_step), metric, inverse_gap)
            conversion = ConversionObjective(Denoiser(network, student), denoise, levels.sigma_min, levels.sigma_max)
            for objective in (pairs, conversion):
                loss = objective.loss(images, 0)
                assert loss.device.type == "cuda"
                assert loss.dtype == torch.float32
