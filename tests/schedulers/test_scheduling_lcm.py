"""Published latent consistency models under our scheduler, against `LCMScheduler` in pipelines of diffusers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import LCMScheduler
from stable_diffusion import IMAGE_SIZE, make_sdxl, make_stable_diffusion

from cm_diffusers import ConsistencyPipeline, ConsistencyScheduler
from cm_diffusers.preconditioning import Denoiser

PROMPT = "a red fox in the snow"
PREDICTIONS = ["epsilon", "v_prediction", "sample"]
SHAPE = (2, 4, 8, 8)
IMAGE = torch.rand(1, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(1))
MASK = (torch.arange(IMAGE_SIZE) < IMAGE_SIZE // 2).float().expand(1, 1, IMAGE_SIZE, IMAGE_SIZE)


def make_lcm_pipeline(prediction_type: str = "epsilon", seed: int = 0) -> Any:
    """A pipeline for networks that are told their guidance scale; it never scales their input."""
    parts = make_stable_diffusion(prediction_type, time_cond_proj_dim=8, seed=seed).components
    return quiet(diffusers.LatentConsistencyModelPipeline(**parts, requires_safety_checker=False))


def quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def as_lcm(pipe: Any, **fields: Any) -> Any:
    """With the scheduler that users of LCM-LoRA are told to set."""
    pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config, **fields)
    return pipe


def draw(pipe: Any, **arguments: Any) -> torch.Tensor:
    options = {"prompt": PROMPT, "num_inference_steps": 4, "generator": torch.Generator().manual_seed(3)}
    return pipe(output_type="latent", **{**options, **arguments}).images


def assert_same(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    assert expected.isfinite().all()
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))


def assert_draws_as_lcm(pipe: Any, tolerance: float = 1e-5, **arguments: Any) -> None:
    """The same latents for the same generator under both schedulers."""
    assert type(pipe.scheduler) is LCMScheduler
    expected = draw(pipe, **arguments)
    pipe.scheduler = ConsistencyScheduler.from_config(pipe.scheduler.config)
    if isinstance(arguments.get("generator"), list):
        for generator in arguments["generator"]:
            generator.manual_seed(generator.initial_seed())
    assert_same(draw(pipe, **arguments), expected, tolerance)


# In stock pipelines --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [make_stable_diffusion, make_sdxl, make_lcm_pipeline])
@pytest.mark.parametrize("prediction_type", PREDICTIONS)
@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_text_to_image_is_that_of_lcm_scheduler(make: Callable[..., Any], prediction_type: str, steps: int) -> None:
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    assert_draws_as_lcm(as_lcm(make(prediction_type)), num_inference_steps=steps, guidance_scale=1.5, **size)


@pytest.mark.parametrize("make", [make_stable_diffusion, make_sdxl])
def test_a_network_that_is_told_its_guidance_runs_in_any_pipeline(make: Callable[..., Any]) -> None:
    assert_draws_as_lcm(as_lcm(make(time_cond_proj_dim=8)), guidance_scale=8.0, height=IMAGE_SIZE, width=IMAGE_SIZE)


def test_each_image_has_its_own_generator() -> None:
    pipe = as_lcm(make_stable_diffusion())
    generators = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
    assert_draws_as_lcm(pipe, prompt=[PROMPT, "a blue cat"], generator=generators)


def test_timesteps_of_the_users_choice() -> None:
    assert_draws_as_lcm(as_lcm(make_stable_diffusion()), num_inference_steps=None, timesteps=[999, 500, 3])


def test_images_are_in_half_precision_what_they_are_in_full() -> None:
    pipe = as_lcm(make_stable_diffusion())
    pipe.scheduler = ConsistencyScheduler.from_config(pipe.scheduler.config)
    expected = draw(pipe)
    assert_same(draw(pipe.to(torch.bfloat16)).float(), expected, 0.1)


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
@pytest.mark.parametrize(("steps", "strength"), [(1, 1.0), (4, 0.5), (8, 0.8)])
def test_image_to_image_is_that_of_lcm_scheduler(prediction_type: str, steps: int, strength: float) -> None:
    pipe = quiet(diffusers.StableDiffusionImg2ImgPipeline.from_pipe(make_stable_diffusion(prediction_type)))
    assert_draws_as_lcm(as_lcm(pipe), image=IMAGE, num_inference_steps=steps, strength=strength)


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
@pytest.mark.parametrize(("steps", "strength"), [(1, 1.0), (4, 0.5), (8, 1.0)])
def test_inpainting_is_that_of_lcm_scheduler(prediction_type: str, steps: int, strength: float) -> None:
    pipe = quiet(diffusers.StableDiffusionInpaintPipeline.from_pipe(make_stable_diffusion(prediction_type)))
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    known = {"image": IMAGE, "mask_image": MASK}
    assert_draws_as_lcm(as_lcm(pipe), **known, num_inference_steps=steps, strength=strength, **size)


@pytest.mark.parametrize("strength", [0.3, 0.8, 1.0])
def test_image_to_image_of_latent_consistency_models_is_that_of_lcm_scheduler(strength: float) -> None:
    parts = make_stable_diffusion(time_cond_proj_dim=8).components
    pipe = diffusers.LatentConsistencyModelImg2ImgPipeline(**parts, requires_safety_checker=False)
    for original in (None, 25):
        again = as_lcm(quiet(pipe))
        assert_draws_as_lcm(again, image=IMAGE, strength=strength, original_inference_steps=original)


@pytest.mark.parametrize("clip", [0.5, 3.0])
def test_clipping_is_that_of_lcm_scheduler(clip: float) -> None:
    """It clips D and adds a share of the state to it, of some 1e-5; we clip the sum."""
    pipe = as_lcm(make_stable_diffusion())
    pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config, clip_sample=True, clip_sample_range=clip)
    assert_draws_as_lcm(pipe, 1e-4)


def test_zero_terminal_snr_starts_with_next_to_no_signal() -> None:
    pipe = as_lcm(make_stable_diffusion("v_prediction"), rescale_betas_zero_snr=True)
    assert_draws_as_lcm(pipe, 1e-3, height=IMAGE_SIZE, width=IMAGE_SIZE)


# Editing with students of other boundaries, in stock pipelines ------------------------------------------------------


@pytest.mark.parametrize("boundary", ["euler", "edm"])
def test_image_to_image_samples_the_consistency_function(boundary: str) -> None:
    pipe = quiet(diffusers.StableDiffusionImg2ImgPipeline.from_pipe(make_stable_diffusion()))
    pipe.scheduler = ConsistencyScheduler.from_teacher(pipe.scheduler, boundary=boundary, clip_denoised=False)
    embeds = torch.randn(1, 5, 8, generator=torch.Generator().manual_seed(2))
    latent = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(4))
    options = {"prompt": None, "prompt_embeds": embeds, "guidance_scale": 1.0}
    found = draw(pipe, image=latent, strength=0.5, num_inference_steps=4, **options)

    generator, scheduler = torch.Generator().manual_seed(3), pipe.scheduler
    f, (high, low) = Denoiser(pipe.unet, scheduler.boundary), scheduler.sigmas[2:4]
    with torch.no_grad():
        x = f(latent + high * torch.randn(latent.shape, generator=generator), high, encoder_hidden_states=embeds)
        up = (low**2 - scheduler.config.sigma_min**2) ** 0.5
        x = f(x + up * torch.randn(latent.shape, generator=generator), low, encoder_hidden_states=embeds)
    assert_same(found, x)


@pytest.mark.parametrize("boundary", ["euler", "edm", "lcm"])
def test_inpainting_keeps_what_is_known(boundary: str) -> None:
    pipe = quiet(diffusers.StableDiffusionInpaintPipeline.from_pipe(make_stable_diffusion()))
    pipe.scheduler = ConsistencyScheduler.from_teacher(pipe.scheduler, boundary=boundary, clip_denoised=False)
    latent = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(4))
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    found = draw(pipe, image=latent, masked_image_latents=latent, mask_image=MASK, strength=1.0, **size)
    unknown = torch.nn.functional.interpolate(MASK, (8, 8)).bool().expand_as(latent)
    assert torch.equal(found[~unknown], latent[~unknown])
    assert not torch.isclose(found[unknown], latent[unknown]).any()


@pytest.mark.parametrize("boundary", ["euler", "lcm"])
def test_our_pipelines_put_back_what_is_known_of_a_state(boundary: str) -> None:
    """Of the state after a step, `known` replaces the clean part, whatever share it has in it."""
    scheduler = ConsistencyScheduler.from_teacher(diffusers.DDPMScheduler(), boundary=boundary)
    scheduler.set_timesteps(2)
    torch.manual_seed(0)
    x, output, known = torch.randn(3, *SHAPE)
    noisier, denoised = scheduler.step(output, scheduler.timesteps[0], x, torch.Generator().manual_seed(3), False)
    noise, sigma = torch.randn(SHAPE, generator=torch.Generator().manual_seed(3)), scheduler.sigmas[1]
    expected = (known + scheduler.added_noise_std(sigma) * noise) / scheduler.state_scale(sigma)
    torch.testing.assert_close(noisier + scheduler.denoised_share(0) * (known - denoised), expected)
    assert scheduler.denoised_share(1) == 1


def test_our_pipelines_start_from_images_as_states_of_unit_variance(make_unet: Callable[..., Any]) -> None:
    scheduler = ConsistencyScheduler.from_teacher(diffusers.DDPMScheduler(), boundary="lcm", clip_denoised=False)
    pipe = quiet(ConsistencyPipeline(make_unet(), scheduler))
    start, noise = torch.randn(2, 2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    found = pipe._sample(2, start=start, latents=noise, sigmas=[5.0], output_type="latent").images
    with torch.no_grad():
        assert_same(found, Denoiser(pipe.unet, scheduler.boundary)(start + 5.0 * noise, 5.0))


# Noise levels --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("timesteps", "original"), [(1000, 50), (1000, 30), (1000, 7), (1000, 1000), (40, 8)])
def test_levels_are_those_of_lcm_scheduler(timesteps: int, original: int) -> None:
    lcm = LCMScheduler(timesteps, original_inference_steps=original)
    scheduler = ConsistencyScheduler.from_config(lcm.config)
    for steps in (1, 2, 3, 4, 5, 7, original):
        lcm.set_timesteps(steps)
        scheduler.set_timesteps(steps)
        torch.testing.assert_close(scheduler.timesteps, lcm.timesteps.float(), rtol=0, atol=1e-4)
        alpha_bar = lcm.alphas_cumprod[lcm.timesteps].double().numpy()
        np.testing.assert_allclose(scheduler.levels_for(steps), ((1 - alpha_bar) / alpha_bar) ** 0.5, rtol=1e-6)
        assert scheduler.init_noise_sigma == lcm.init_noise_sigma
    assert scheduler.grid_length == len(scheduler.grid) == original
    np.testing.assert_allclose(scheduler.grid, scheduler.levels_for(original))


def test_original_steps_of_one_call() -> None:
    lcm = LCMScheduler()
    scheduler = ConsistencyScheduler.from_config(lcm.config, few_step_sigmas={"4": [14.0, 4.0, 2.0, 1.0]})
    scheduler.set_timesteps(4, original_inference_steps=100, strength=0.63)
    lcm.set_timesteps(4, original_inference_steps=100, strength=0.63)
    torch.testing.assert_close(scheduler.timesteps, lcm.timesteps.float(), rtol=0, atol=1e-4)


def test_stored_levels_come_first() -> None:
    scheduler = ConsistencyScheduler.from_config(LCMScheduler().config, few_step_sigmas={"2": [14.0, 3.0]})
    assert scheduler.levels_for(2).tolist() == [14.0, 3.0]
    assert len(scheduler.levels_for(3)) == 3


def test_a_student_of_another_boundary_may_have_the_grid_too() -> None:
    scheduler = ConsistencyScheduler.from_teacher(diffusers.DDPMScheduler(), original_inference_steps=50)
    assert scheduler.config.boundary == "euler"
    scheduler.set_timesteps(2)
    torch.testing.assert_close(scheduler.timesteps, torch.tensor([999.0, 499.0]), rtol=0, atol=1e-4)
    assert scheduler.init_noise_sigma == pytest.approx(float(scheduler.sigmas[0]))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"original_inference_steps": 0}, "`original_inference_steps` must be an integer from 1 to .*=1000, got 0"),
        ({"original_inference_steps": 1001}, "from 1 to num_train_timesteps=1000, got 1001"),
        ({"original_inference_steps": 2.5}, "must be an integer"),
        ({"original_inference_steps": 50, "num_levels": 18}, "one grid"),
        ({"original_inference_steps": 50, "sigma_max": 80.0}, "original_inference_steps=50.*sigma_max=80"),
    ],
)
def test_grids_that_are_none_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ConsistencyScheduler.from_teacher(diffusers.DDPMScheduler(), **fields)


def test_other_families_have_no_original_steps() -> None:
    with pytest.raises(ValueError, match="for the family 'vp', not 'flow'"):
        ConsistencyScheduler(family="flow", boundary="euler", original_inference_steps=50)
    with pytest.raises(ValueError, match="for the family 'vp'.*family is 'consistency'"):
        ConsistencyScheduler().set_timesteps(2, original_inference_steps=10)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_inference_steps": 51}, "num_inference_steps=51.*50 levels"),
        ({"num_inference_steps": 11, "strength": 0.2}, "num_inference_steps=11.*10 levels"),
        ({"num_inference_steps": 2, "strength": 1.2}, "`strength` must lie above 0"),
        ({"timesteps": [999], "strength": 0.5}, "`strength` is for `num_inference_steps`"),
    ],
)
def test_schedules_that_the_student_does_not_have_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ConsistencyScheduler.from_config(LCMScheduler().config).set_timesteps(**arguments)


def test_strength_needs_original_steps() -> None:
    scheduler = ConsistencyScheduler.from_teacher(diffusers.DDPMScheduler(), boundary="lcm")
    with pytest.raises(ValueError, match="`strength` for students of such steps"):
        scheduler.set_timesteps(2, strength=0.5)


# States --------------------------------------------------------------------------------------------------------------


def test_noise_is_added_as_lcm_scheduler_does() -> None:
    lcm = LCMScheduler()
    scheduler = ConsistencyScheduler.from_config(lcm.config)
    images, noise = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0))
    timesteps = torch.tensor([999, 19])
    for dtype in (torch.float32, torch.float16):
        expected = lcm.add_noise(images.to(dtype), noise.to(dtype), timesteps)
        found = scheduler.add_noise(images.to(dtype), noise.to(dtype), timesteps)
        assert found.dtype == dtype
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 if dtype == torch.float32 else 3e-3)


def test_its_answer_counts_as_clean() -> None:
    scheduler = ConsistencyScheduler.from_config(LCMScheduler().config)
    assert torch.equal(scheduler.added_noise_std(torch.tensor(2.0)), torch.tensor(2.0))


# There and back ------------------------------------------------------------------------------------------------------


LCM_CONFIGS = [
    {},
    {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_scaling": 7.0},
    {"num_train_timesteps": 500, "original_inference_steps": 25, "beta_schedule": "squaredcos_cap_v2"},
    {"clip_sample": True, "clip_sample_range": 2.5, "prediction_type": "sample"},
    {"trained_betas": np.linspace(0.001, 0.3, 50).tolist(), "num_train_timesteps": 50, "original_inference_steps": 10},
]


@pytest.mark.parametrize("fields", LCM_CONFIGS)
def test_config_of_an_lcm_scheduler_survives_the_way_there_and_back(fields: dict[str, Any]) -> None:
    def plain(scheduler: Any) -> dict[str, Any]:
        return {name: value for name, value in scheduler.config.items() if name[0] != "_"}

    ours = ConsistencyScheduler.from_config(LCMScheduler(**fields).config)
    assert plain(ours.to_lcm()) == plain(LCMScheduler(**fields, steps_offset=1))  # which changes nothing
    assert plain(ConsistencyScheduler.from_config(ours.to_lcm().config)) == plain(ours)


def test_fields_of_an_lcm_scheduler() -> None:
    config = ConsistencyScheduler.from_config(LCMScheduler(clip_sample=True, clip_sample_range=2.0).config).config
    assert (config.family, config.boundary, config.prediction_type) == ("vp", "lcm", "epsilon")
    assert (config.original_inference_steps, config.clip_denoised, list(config.image_range)) == (50, True, [-2.0, 2.0])
    assert (config.sigma_min, config.sigma_max) == pytest.approx((0.0292, 14.61), rel=2e-3)


def test_arguments_replace_fields_of_an_lcm_scheduler() -> None:
    scheduler = ConsistencyScheduler.from_config(LCMScheduler().config, clip_denoised=True, sigma_max=10.0 + 4.7)
    assert (scheduler.config.clip_denoised, scheduler.config.sigma_max) == (True, 14.7)


def test_saved_lcm_scheduler_loads_as_ours(tmp_path: Path) -> None:
    LCMScheduler(original_inference_steps=25).save_pretrained(tmp_path)
    loaded = ConsistencyScheduler.from_pretrained(tmp_path)
    assert (loaded.config.boundary, loaded.config.original_inference_steps) == ("lcm", 25)
    loaded.save_pretrained(tmp_path / "ours")
    again = ConsistencyScheduler.from_pretrained(tmp_path / "ours")
    assert again.config.original_inference_steps == 25


def test_what_changes_nothing_is_ignored() -> None:
    euler = diffusers.EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="trailing",
        use_karras_sigmas=True, steps_offset=1,
    )  # fmt: skip
    lcm = LCMScheduler.from_config(euler.config, set_alpha_to_one=False)
    scheduler = ConsistencyScheduler.from_config(lcm.config)
    assert "use_karras_sigmas" not in scheduler.config
    assert scheduler.config == ConsistencyScheduler.from_config(LCMScheduler().config).config


def test_thresholding_is_refused() -> None:
    with pytest.raises(ValueError, match="thresholding=True"):
        ConsistencyScheduler.from_config(LCMScheduler(thresholding=True).config)


def test_other_schedulers_describe_no_student(tmp_path: Path) -> None:
    diffusers.TCDScheduler().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="TCDScheduler's.*from_teacher"):
        ConsistencyScheduler.from_pretrained(tmp_path)


def test_lcm_scheduler_of_a_teacher_is_a_teachers() -> None:
    assert ConsistencyScheduler.from_teacher(LCMScheduler()).config.boundary == "euler"


@pytest.mark.parametrize(
    ("teacher", "fields", "reason"),
    [
        (diffusers.DDPMScheduler(), {}, "its family is 'vp' and its boundary 'euler'"),
        (diffusers.EDMEulerScheduler(), {}, "its family is 'edm'"),
        (diffusers.DDPMScheduler(), {"boundary": "lcm", "sigma_max": 80.0}, "up to timestep 9.*, and .* at 999"),
        (diffusers.DDPMScheduler(), {"boundary": "lcm", "sigma_min": 0.1}, "identity at timestep 2.*Scheduler at 0"),
        (diffusers.DDPMScheduler(), {"boundary": "lcm", "s_noise": 1.1}, "its s_noise is 1.1"),
        (diffusers.DDPMScheduler(), {"boundary": "lcm", "sigma_data": 0.7}, "its sigma_data is 0.7"),
        (diffusers.DDPMScheduler(), {"boundary": "lcm", "image_range": [0.0, 1.0]}, r"its images lie in \[0.0, 1.0\]"),
        (diffusers.DDPMScheduler(beta_schedule="sigmoid"), {"boundary": "lcm"}, "its betas are 'sigmoid'"),
    ],
)
def test_what_lcm_scheduler_does_not_compute_is_refused(teacher: Any, fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=f"LCMScheduler does not compute this student: .*{reason}"):
        ConsistencyScheduler.from_teacher(teacher, **fields).to_lcm()
