from __future__ import annotations

import copy

import pytest
import torch
from diffusers import ConsistencyModelPipeline, EDMEulerScheduler

from cm_diffusers.network_config import read_preconditioning
from cm_diffusers.preconditioning import EDMPreconditioning
from cm_diffusers.schedulers import ConsistencyScheduler, ScaledTimeEDMScheduler
from cm_diffusers.training.student import make_student
from cm_diffusers.training.teacher import load_teacher

SIGMAS = torch.tensor([0.002, 0.1, 2.0, 80.0])


def test_time_is_a_multiple_of_edms() -> None:
    scheduler = ScaledTimeEDMScheduler()
    torch.testing.assert_close(scheduler.precondition_noise(SIGMAS), 250 * SIGMAS.log())
    torch.testing.assert_close(scheduler.timesteps, 1000 * EDMEulerScheduler().timesteps)


def test_all_else_is_edms() -> None:
    ours, theirs = ScaledTimeEDMScheduler(sigma_data=0.6, time_scale=3), EDMEulerScheduler(sigma_data=0.6)
    generator = torch.Generator().manual_seed(0)
    x, output = torch.randn(2, 2, 3, 4, 4, generator=generator)
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(5)
        scheduler.scale_model_input(x, scheduler.timesteps[0])
    steps = [scheduler.step(output, scheduler.timesteps[0], x).prev_sample for scheduler in (ours, theirs)]
    assert torch.equal(*steps)
    assert ours.init_noise_sigma == theirs.init_noise_sigma


def test_it_is_read_as_edm_with_that_time() -> None:
    base = read_preconditioning(ScaledTimeEDMScheduler(sigma_min=0.01, prediction_type="v_prediction", time_scale=40))
    assert base == EDMPreconditioning((0.01, 80.0), 0.5, -1.0, 40)
    torch.testing.assert_close(base.c_noise(SIGMAS).float(), 10 * SIGMAS.log())
    torch.testing.assert_close(base.sigma_from_c_noise(base.c_noise(SIGMAS)).float(), SIGMAS)


def test_pipeline_with_it_is_saved_and_loaded(class_unet, tmp_path) -> None:
    pipeline = ConsistencyModelPipeline(class_unet, ScaledTimeEDMScheduler())
    pipeline.save_pretrained(tmp_path)
    loaded = ConsistencyModelPipeline.from_pretrained(tmp_path)
    drawn = [
        pipe(2, [0, 3], 4, generator=torch.Generator().manual_seed(0), output_type="pt").images
        for pipe in (pipeline, loaded)
    ]
    assert torch.equal(*drawn)
    assert load_teacher(tmp_path).preconditioning.time_scale == 1000


def test_student_keeps_a_consistency_networks_time_to_the_bit(unet) -> None:
    before = copy.deepcopy(unet.state_dict())
    student, scheduler = make_student(unet, ScaledTimeEDMScheduler(), convert=True)
    assert scheduler.is_stock
    assert torch.equal(scheduler.preconditioning.c_noise(SIGMAS), 250 * SIGMAS.double().log())
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())


def test_student_that_is_not_converted_keeps_the_teachers_time(unet) -> None:
    _, scheduler = make_student(unet, ScaledTimeEDMScheduler(time_scale=40), convert=False)
    assert (scheduler.config.family, scheduler.config.time_scale) == ("edm", 40)
    again = ConsistencyScheduler.from_config(scheduler.config)
    torch.testing.assert_close(again.preconditioning.c_noise(SIGMAS).float(), 10 * SIGMAS.log())


def test_time_scale_must_be_positive() -> None:
    with pytest.raises(ValueError, match="time_scale.*positive, got 0"):
        ScaledTimeEDMScheduler(time_scale=0)
