from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    CMStochasticIterativeScheduler,
    ConsistencyModelPipeline,
    DDIMScheduler,
    DDPMScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    ScoreSdeVeScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)

from cm_diffusers import ConsistencyPipeline, ConsistencyScheduler, ConsistencySchedulerOutput
from cm_diffusers.preconditioning import Denoiser

TEACHERS = {
    "vp-epsilon": DDPMScheduler(),
    "vp-v_prediction": DDPMScheduler(prediction_type="v_prediction"),
    "vp-sample": DDPMScheduler(prediction_type="sample"),
    "vp-exp": HeunDiscreteScheduler(beta_schedule="exp"),
    "edm": EDMEulerScheduler(),
    "edm-negative": EDMEulerScheduler(prediction_type="v_prediction"),
    "consistency": CMStochasticIterativeScheduler(),
    "flow": FlowMatchEulerDiscreteScheduler(),
    "ve": ScoreSdeVeScheduler(),
}
SHAPE = (3, 3, 4, 4)


@pytest.fixture(params=TEACHERS)
def scheduler(request: pytest.FixtureRequest) -> ConsistencyScheduler:
    """The scheduler of a student of each family."""
    return ConsistencyScheduler.from_teacher(TEACHERS[request.param])


def network(sample: torch.Tensor, timestep: torch.Tensor, return_dict: bool = False, **_: Any) -> tuple[torch.Tensor]:
    """Some function of both arguments, of order one. UNets embed the time in float32, too."""
    return (torch.sin(3 * sample) * torch.cos(timestep.float() / 300).view(-1, *[1] * (sample.ndim - 1)),)


def sample_with(
    scheduler: ConsistencyScheduler,
    latents: torch.Tensor,
    generator: torch.Generator,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """The sampling loop of any diffusers pipeline."""
    sample = (latents * scheduler.init_noise_sigma).to(dtype)
    for t in scheduler.timesteps:
        output = network(scheduler.scale_model_input(sample, t), t)[0]
        sample = scheduler.step(output, t, sample, generator=generator).prev_sample
    return sample


@pytest.fixture
def latents() -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))


# Saving and loading --------------------------------------------------------------------------------------------------


def test_saved_config_loads_to_the_same_scheduler(scheduler: ConsistencyScheduler, tmp_path: Path) -> None:
    scheduler.save_pretrained(tmp_path)
    loaded = ConsistencyScheduler.from_pretrained(tmp_path)

    def plain(config: Any) -> dict[str, Any]:
        return {k: v for k, v in json.loads(json.dumps(dict(config))).items() if not k.startswith("_")}

    assert plain(loaded.config) == plain(scheduler.config)


def test_saved_scheduler_steps_alike(scheduler: ConsistencyScheduler, tmp_path: Path, latents: torch.Tensor) -> None:
    scheduler.save_pretrained(tmp_path)
    loaded = ConsistencyScheduler.from_pretrained(tmp_path)
    samples = []
    for one in (scheduler, loaded):
        one.set_timesteps(3)
        samples.append(sample_with(one, latents, torch.Generator().manual_seed(0)))
    assert torch.equal(*samples)


def test_from_config_of_itself_keeps_every_field(scheduler: ConsistencyScheduler) -> None:
    copy = ConsistencyScheduler.from_config(scheduler.config)
    assert {k: v for k, v in copy.config.items() if k[0] != "_"} == {
        k: v for k, v in scheduler.config.items() if k[0] != "_"
    }


@pytest.mark.parametrize("field", [{"sigma_max": 40.0}, {"num_train_timesteps": 18}, {"sigma_data": 0.7, "rho": 5.0}])
def test_from_config_of_the_stock_scheduler_keeps_its_fields(field: dict[str, Any]) -> None:
    scheduler = ConsistencyScheduler.from_config(CMStochasticIterativeScheduler(**field).config)
    assert {name: scheduler.config[name] for name in field} == field
    assert scheduler.config.family == "consistency"


def test_compatibles_are_itself_and_the_stock_class() -> None:
    assert ConsistencyScheduler().compatibles == [ConsistencyScheduler, CMStochasticIterativeScheduler]


def test_consistency_family_is_saved_under_the_stock_name(tmp_path: Path) -> None:
    ConsistencyScheduler(sigma_max=40.0).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "scheduler_config.json").read_text())
    assert saved["_class_name"] == "CMStochasticIterativeScheduler"
    assert CMStochasticIterativeScheduler.from_pretrained(tmp_path).config.sigma_max == 40.0


@pytest.mark.parametrize("name", [name for name in TEACHERS if name != "consistency"])
def test_other_families_are_saved_under_our_name(name: str, tmp_path: Path) -> None:
    ConsistencyScheduler.from_teacher(TEACHERS[name]).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "scheduler_config.json").read_text())["_class_name"] == "ConsistencyScheduler"


def test_consistency_network_on_other_image_values_is_saved_under_our_name(tmp_path: Path) -> None:
    ConsistencyScheduler(image_range=[0.0, 1.0]).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "scheduler_config.json").read_text())["_class_name"] == "ConsistencyScheduler"


# The contract of diffusers' schedulers -------------------------------------------------------------------------------


def test_step_keeps_shape_and_dtype(scheduler: ConsistencyScheduler, latents: torch.Tensor) -> None:
    scheduler.set_timesteps(4)
    for t in scheduler.timesteps:
        output = scheduler.step(0.1 * latents, t, latents)
        assert isinstance(output, ConsistencySchedulerOutput)
        assert output.prev_sample.shape == output.denoised.shape == latents.shape
        assert output.prev_sample.dtype == output.denoised.dtype == latents.dtype


def test_step_returns_a_tuple_of_the_same_values(scheduler: ConsistencyScheduler, latents: torch.Tensor) -> None:
    outputs = []
    for return_dict in (True, False):
        scheduler.set_timesteps(2)
        generator, t = torch.Generator().manual_seed(0), scheduler.timesteps[0]
        outputs.append(scheduler.step(0.1 * latents, t, latents, generator, return_dict=return_dict))
    assert torch.equal(outputs[0].prev_sample, outputs[1][0])
    assert torch.equal(outputs[0].denoised, outputs[1][1])


@pytest.mark.parametrize("timestep", [0, 0.0, 1, 500, torch.tensor(3), torch.tensor(7.5, dtype=torch.float16)])
def test_timesteps_off_the_grid_are_taken_to_the_nearest(
    scheduler: ConsistencyScheduler, timestep: Any, latents: torch.Tensor
) -> None:
    scheduler.set_timesteps(5)
    nearest = int(np.argmin(np.abs(scheduler.timesteps.numpy() - float(timestep))))
    scheduler.step(0.1 * latents, timestep, latents)
    assert scheduler.step_index == nearest + 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_timestep_is_found_in_half_precision(dtype: torch.dtype) -> None:
    scheduler = ConsistencyScheduler()
    scheduler.set_timesteps(10)
    assert [scheduler.index_for_timestep(t.to(dtype)) for t in scheduler.timesteps] == list(range(10))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_half_precision(
    scheduler: ConsistencyScheduler, dtype: torch.dtype, latents: torch.Tensor, generator: torch.Generator
) -> None:
    scheduler.set_timesteps(3)
    assert scheduler.scale_model_input(latents.to(dtype), scheduler.timesteps[0]).dtype == dtype
    sample = sample_with(scheduler, latents, generator, dtype)
    assert sample.dtype == dtype
    assert sample.isfinite().all()


def test_half_precision_steps_are_computed_in_float32(latents: torch.Tensor) -> None:
    samples = []
    for dtype in (torch.float16, torch.float32):
        scheduler = ConsistencyScheduler.from_teacher(TEACHERS["vp-epsilon"], clip_denoised=False)
        scheduler.set_timesteps(1)
        state = (80 * latents).half()
        samples.append(scheduler.step(latents.half().to(dtype), 999, state.to(dtype)).denoised.float())
    torch.testing.assert_close(*samples, rtol=1e-3, atol=1e-3)


def test_list_of_generators_makes_samples_independent_of_the_batch(
    scheduler: ConsistencyScheduler, latents: torch.Tensor
) -> None:
    def generators() -> list[torch.Generator]:
        return [torch.Generator().manual_seed(seed) for seed in range(3)]

    scheduler.set_timesteps(2)
    t = scheduler.timesteps[0]
    together = scheduler.step(0.1 * latents, t, latents, generators()).prev_sample
    for i in range(3):
        scheduler.set_timesteps(2)
        alone = scheduler.step(0.1 * latents[i : i + 1], t, latents[i : i + 1], generators()[i : i + 1]).prev_sample
        assert torch.equal(alone[0], together[i])


def test_add_noise_is_x0_plus_sigma_of_the_timestep(scheduler: ConsistencyScheduler, latents: torch.Tensor) -> None:
    scheduler.set_timesteps(5)
    noise, timesteps = torch.randn(SHAPE), scheduler.timesteps[[0, 2, 4]]
    expected = latents + scheduler.sigmas[[0, 2, 4]].view(-1, 1, 1, 1) * noise
    torch.testing.assert_close(scheduler.add_noise(latents, noise, timesteps), expected, rtol=1e-4, atol=1e-4)


def test_add_noise_takes_timesteps_off_the_schedule() -> None:
    scheduler = ConsistencyScheduler.from_teacher(TEACHERS["vp-epsilon"])
    scheduler.set_timesteps(1)
    alpha_bar = TEACHERS["vp-epsilon"].alphas_cumprod[[3, 700]]
    noisy = scheduler.add_noise(torch.zeros(2, 1, 1, 1), torch.ones(2, 1, 1, 1), torch.tensor([3, 700]))
    torch.testing.assert_close(noisy.flatten(), ((1 - alpha_bar) / alpha_bar) ** 0.5, rtol=1e-4, atol=0)


@pytest.mark.parametrize("name", [name for name in TEACHERS if name.startswith("vp")])
def test_timesteps_lie_in_the_trained_range(name: str) -> None:
    scheduler = ConsistencyScheduler.from_teacher(TEACHERS[name])
    scheduler.set_timesteps(50)
    assert scheduler.timesteps.min() >= 0
    assert scheduler.timesteps.max() <= 999
    assert (scheduler.timesteps.diff() < 0).all()


def test_begin_index_starts_in_the_middle(scheduler: ConsistencyScheduler, latents: torch.Tensor) -> None:
    scheduler.set_timesteps(5)
    scheduler.set_begin_index(2)
    scheduler.step(0.1 * latents, scheduler.timesteps[2], latents)
    assert (scheduler.begin_index, scheduler.step_index) == (2, 3)


def test_set_timesteps_starts_anew(scheduler: ConsistencyScheduler, latents: torch.Tensor) -> None:
    scheduler.set_timesteps(2)
    scheduler.set_begin_index(1)
    scheduler.step(0.1 * latents, scheduler.timesteps[1], latents)
    scheduler.set_timesteps(2)
    assert (scheduler.begin_index, scheduler.step_index) == (None, None)


def test_scale_model_input_divides_by_the_familys_scale() -> None:
    scheduler = ConsistencyScheduler.from_teacher(TEACHERS["vp-epsilon"])
    scheduler.set_timesteps(sigmas=[3.0])
    scaled = scheduler.scale_model_input(torch.full((1, 1, 1, 1), 2.0), scheduler.timesteps[0])
    assert scaled.item() == pytest.approx(2 / 10**0.5)


def test_scale_model_input_of_the_consistency_family_is_the_stock_schedulers(latents: torch.Tensor) -> None:
    stock, ours = CMStochasticIterativeScheduler(), ConsistencyScheduler()
    for scheduler in (stock, ours):
        scheduler.set_timesteps(7)
        scheduler.set_begin_index(3)
    t = stock.timesteps[3]
    assert torch.equal(ours.scale_model_input(latents, t), stock.scale_model_input(latents, t))


# Schedules -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 18, 40])
def test_schedules_are_the_stock_schedulers(steps: int) -> None:
    stock, ours = CMStochasticIterativeScheduler(), ConsistencyScheduler()
    stock.set_timesteps(steps)
    ours.set_timesteps(steps)
    assert torch.equal(ours.sigmas, stock.sigmas)
    torch.testing.assert_close(ours.timesteps, stock.timesteps.float(), rtol=1e-6, atol=0)


def test_schedule_of_grid_indices_is_the_stock_schedulers() -> None:
    stock, ours = CMStochasticIterativeScheduler(), ConsistencyScheduler()
    stock.set_timesteps(timesteps=[22, 0])
    ours.set_timesteps(timesteps=[22, 0])
    assert torch.equal(ours.sigmas, stock.sigmas)


def test_timesteps_of_a_vp_student_are_the_networks_own() -> None:
    scheduler = ConsistencyScheduler.from_teacher(TEACHERS["vp-epsilon"])
    scheduler.set_timesteps(timesteps=[900, 400, 10])
    alpha_bar = TEACHERS["vp-epsilon"].alphas_cumprod[[900, 400, 10]]
    torch.testing.assert_close(scheduler.timesteps, torch.tensor([900.0, 400.0, 10.0]), rtol=0, atol=1e-3)
    torch.testing.assert_close(scheduler.sigmas[:-1], ((1 - alpha_bar) / alpha_bar) ** 0.5, rtol=1e-4, atol=0)


def test_sigmas_are_taken_as_they_are(scheduler: ConsistencyScheduler) -> None:
    scheduler.set_timesteps(sigmas=[60.0, 5.0, 0.821])
    assert torch.equal(scheduler.sigmas[:-1], torch.tensor([60.0, 5.0, 0.821]))
    assert scheduler.num_inference_steps == 3


def test_sigmas_may_be_tensors_or_arrays(scheduler: ConsistencyScheduler) -> None:
    for kind in (torch.tensor, np.array, tuple):
        scheduler.set_timesteps(sigmas=kind([60.0, 5.0]))
        assert torch.equal(scheduler.sigmas[:-1], torch.tensor([60.0, 5.0]))


@pytest.mark.parametrize(
    "arguments",
    [{}, {"num_inference_steps": 2, "timesteps": [22, 0]}, {"timesteps": [22, 0], "sigmas": [1.0]}],
)
def test_exactly_one_way_to_choose_a_schedule(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="exactly one"):
        ConsistencyScheduler().set_timesteps(**arguments)


@pytest.mark.parametrize("steps", [0, -1, 1.5, True, "2"])
def test_number_of_steps_is_a_positive_integer(steps: Any) -> None:
    with pytest.raises(ValueError, match="num_inference_steps"):
        ConsistencyScheduler().set_timesteps(steps)


def test_more_steps_than_the_grid_has_are_refused() -> None:
    with pytest.raises(ValueError, match="num_inference_steps=41.*40 levels"):
        ConsistencyScheduler().set_timesteps(41)


@pytest.mark.parametrize("timesteps", [[0, 22], [22, 22], [], [[22, 0]], [float("nan"), 0]])
def test_timesteps_must_descend(scheduler: ConsistencyScheduler, timesteps: list[Any]) -> None:
    with pytest.raises(ValueError, match="descending"):
        scheduler.set_timesteps(timesteps=timesteps)


@pytest.mark.parametrize("timesteps", [[40, 0], [22, -1], [float("nan")]])
def test_grid_indices_must_lie_on_the_grid(timesteps: list[float]) -> None:
    with pytest.raises(ValueError, match=r"\[0, 40\)"):
        ConsistencyScheduler().set_timesteps(timesteps=timesteps)


def test_timesteps_above_sigma_max_are_refused() -> None:
    with pytest.raises(ValueError, match="timesteps=.999.*sigma_max=80"):
        ConsistencyScheduler.from_teacher(TEACHERS["vp-epsilon"]).set_timesteps(timesteps=[999])


@pytest.mark.parametrize("sigmas", [[1.0, 2.0], [1.0, 1.0], [], [float("nan"), 1.0]])
def test_sigmas_must_descend(sigmas: list[float]) -> None:
    with pytest.raises(ValueError, match="descending"):
        ConsistencyScheduler().set_timesteps(sigmas=sigmas)


@pytest.mark.parametrize("sigmas", [[80.1], [1.0, 0.001], [0.0], [float("nan")], [float("inf")]])
def test_sigmas_must_lie_in_the_range(sigmas: list[float]) -> None:
    with pytest.raises(ValueError, match="sigma_min=0.002, sigma_max=80"):
        ConsistencyScheduler().set_timesteps(sigmas=sigmas)


@pytest.mark.parametrize(("low", "high"), [(0.0, 80.0), (2.0, 1.0), (-1.0, 1.0)])
def test_range_of_sigma_must_be_one(low: float, high: float) -> None:
    with pytest.raises(ValueError, match="0 < sigma_min < sigma_max"):
        ConsistencyScheduler(sigma_min=low, sigma_max=high)


@pytest.mark.parametrize("fields", [{"boundary": "lcm"}, {"boundary": "euler"}, {"family": "ve", "boundary": "lcm"}])
def test_impossible_boundaries_are_refused_at_once(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="boundary"):
        ConsistencyScheduler(**fields)


# Stored schedules ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["2", 2])
def test_stored_levels_are_used_for_their_number_of_steps(key: Any) -> None:
    scheduler = ConsistencyScheduler(few_step_sigmas={key: [80.0, 0.821]})
    scheduler.set_timesteps(2)
    assert torch.equal(scheduler.sigmas[:-1], torch.tensor([80.0, 0.821]))


def test_other_numbers_of_steps_do_not_use_stored_levels() -> None:
    scheduler, plain = ConsistencyScheduler(few_step_sigmas={"2": [80.0, 0.821]}), ConsistencyScheduler()
    for one in (scheduler, plain):
        one.set_timesteps(3)
    assert torch.equal(scheduler.sigmas, plain.sigmas)


@pytest.mark.parametrize("name", ["vp-epsilon", "consistency"])
@pytest.mark.parametrize("key", ["2", 2])
def test_stored_levels_survive_saving(name: str, key: Any, tmp_path: Path) -> None:
    stored = {key: [80.0, 0.821]}
    ConsistencyScheduler.from_teacher(TEACHERS[name], few_step_sigmas=stored).save_pretrained(tmp_path)
    loaded = ConsistencyScheduler.from_pretrained(tmp_path)
    loaded.set_timesteps(2)
    assert torch.equal(loaded.sigmas[:-1], torch.tensor([80.0, 0.821]))


def test_stored_levels_survive_the_stock_scheduler(tmp_path: Path) -> None:
    ConsistencyScheduler(few_step_sigmas={"2": [80.0, 0.821]}).save_pretrained(tmp_path / "ours")
    CMStochasticIterativeScheduler.from_pretrained(tmp_path / "ours").save_pretrained(tmp_path / "stock")
    loaded = ConsistencyScheduler.from_pretrained(tmp_path / "stock")
    assert loaded.config.few_step_sigmas == {"2": [80.0, 0.821]}


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        ({"2": [80.0]}, "must hold 2 noise levels"),
        ({"2": [0.8, 80.0]}, "descending"),
        ({"1": [81.0]}, "sigma_max=80"),
    ],
)
def test_bad_stored_levels_are_refused(stored: dict[str, list[float]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ConsistencyScheduler(few_step_sigmas=stored)


# Steps ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("name", TEACHERS)
def test_denoised_is_the_consistency_function(name: str, clip: bool, latents: torch.Tensor) -> None:
    scheduler = ConsistencyScheduler.from_teacher(TEACHERS[name], clip_denoised=clip)
    f = Denoiser(network, scheduler.boundary)
    scheduler.set_timesteps(6)
    for t, sigma in zip(scheduler.timesteps, scheduler.sigmas, strict=False):
        x = latents * sigma
        expected = f(x, sigma)
        expected = expected.clamp(*scheduler.config.image_range) if clip else expected
        denoised = scheduler.step(network(scheduler.scale_model_input(x, t), t)[0], t, x).denoised
        torch.testing.assert_close(denoised, expected, rtol=1e-6, atol=1e-6)


def test_step_adds_noise_up_to_the_next_level(latents: torch.Tensor) -> None:
    scheduler = ConsistencyScheduler.from_teacher(TEACHERS["edm"], sigma_min=0.6, s_noise=1.1)
    scheduler.set_timesteps(sigmas=[10.0, 1.0])
    output = scheduler.step(latents, scheduler.timesteps[0], latents, torch.Generator().manual_seed(5))
    noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(output.prev_sample, output.denoised + 1.1 * 0.8 * noise, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", [name for name in TEACHERS if name != "consistency"])
def test_nothing_is_added_after_the_last_step(name: str, latents: torch.Tensor) -> None:
    scheduler = ConsistencyScheduler.from_teacher(TEACHERS[name])
    scheduler.set_timesteps(sigmas=[50.0, 3.0, 0.4])
    for t in scheduler.timesteps:
        output = scheduler.step(0.1 * latents, t, latents)
    assert torch.equal(output.prev_sample, output.denoised)


def test_nothing_is_added_in_a_single_step(scheduler: ConsistencyScheduler, latents: torch.Tensor) -> None:
    scheduler.set_timesteps(1)
    output = scheduler.step(0.1 * latents, scheduler.timesteps[0], latents)
    assert torch.equal(output.prev_sample, output.denoised)


def test_nothing_but_rounding_is_added_after_the_last_step_of_stock_networks(latents: torch.Tensor) -> None:
    scheduler = ConsistencyScheduler()
    scheduler.set_timesteps(timesteps=[22, 0])
    for t in scheduler.timesteps:
        output = scheduler.step(0.1 * latents, t, latents)
    torch.testing.assert_close(output.prev_sample, output.denoised, rtol=0, atol=1e-5)


def test_no_sigma_min_makes_samples_nan(latents: torch.Tensor, generator: torch.Generator) -> None:
    for sigma_min in np.random.default_rng(0).uniform(0.001, 0.1, 100).tolist():
        for family, boundary in (("consistency", "edm"), ("edm", "euler")):
            scheduler = ConsistencyScheduler(sigma_min=sigma_min, family=family, boundary=boundary)
            scheduler.set_timesteps(2)
            assert sample_with(scheduler, latents[:1], generator).isfinite().all(), (sigma_min, family)


@pytest.mark.parametrize("range_", [(-1.0, 1.0), (0.0, 1.0)])
def test_denoised_is_clipped_to_the_image_range(range_: tuple[float, float], latents: torch.Tensor) -> None:
    scheduler = ConsistencyScheduler.from_teacher(TEACHERS["vp-sample"], image_range=range_)
    scheduler.set_timesteps(1)
    denoised = scheduler.step(100 * latents, scheduler.timesteps[0], latents).denoised
    assert (denoised.min(), denoised.max()) == range_


def test_predicted_variance_is_dropped_in_steps(scheduler: ConsistencyScheduler, latents: torch.Tensor) -> None:
    scheduler.set_timesteps(1)
    t = scheduler.timesteps[0]
    expected = scheduler.step(0.1 * latents, t, latents).prev_sample
    with_variance = torch.cat([0.1 * latents, torch.full_like(latents, 9.0)], dim=1)
    scheduler.set_timesteps(1)
    assert torch.equal(scheduler.step(with_variance, t, latents).prev_sample, expected)


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_sampling_a_consistency_network_is_bit_identical_to_stock(steps: int, latents: torch.Tensor) -> None:
    samples = []
    for scheduler in (CMStochasticIterativeScheduler(), ConsistencyScheduler()):
        scheduler.set_timesteps(steps)
        samples.append(sample_with(scheduler, latents, torch.Generator().manual_seed(0)))
    assert torch.equal(*samples)


# From a teacher ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "boundary"), [("vp-epsilon", "euler"), ("flow", "euler"), ("ve", "euler"), ("edm", "edm")]
)
def test_default_boundary_of_a_family(name: str, boundary: str) -> None:
    assert ConsistencyScheduler.from_teacher(TEACHERS[name]).config.boundary == boundary


@pytest.mark.parametrize(
    ("teacher", "expected"),
    [
        (EDMEulerScheduler(), (0.002, 80.0)),
        (EDMEulerScheduler(sigma_min=1e-4, sigma_max=500.0), (0.002, 80.0)),
        (EDMEulerScheduler(sigma_min=0.01, sigma_max=50.0), (0.01, 50.0)),
        (DDPMScheduler(), (0.0100, 80.0)),
        (DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"), (0.0292, 14.61)),
    ],
)
def test_default_range_of_sigma_lies_in_the_teachers(teacher: Any, expected: tuple[float, float]) -> None:
    config = ConsistencyScheduler.from_teacher(teacher).config
    assert (config.sigma_min, config.sigma_max) == pytest.approx(expected, rel=2e-3)


@pytest.mark.parametrize("overrides", [{"sigma_min": 0.001}, {"sigma_max": 200.0}])
def test_range_of_sigma_outside_the_teachers_is_refused(overrides: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"leaves the teacher's, \[0.0100\d*, 157"):
        ConsistencyScheduler.from_teacher(DDPMScheduler(), **overrides)


def test_rounded_ends_of_the_teachers_range_are_accepted() -> None:
    low, high = ConsistencyScheduler.from_teacher(DDPMScheduler()).preconditioning.sigma_range
    ends = {"sigma_min": float(np.float32(low)), "sigma_max": float(np.float32(high))}
    assert ConsistencyScheduler.from_teacher(DDPMScheduler(), **ends).config.sigma_max == ends["sigma_max"]


def test_lcm_boundary_is_anchored_at_timestep_zero() -> None:
    scheduler = ConsistencyScheduler.from_teacher(DDPMScheduler(), boundary="lcm")
    alpha_bar = float(DDPMScheduler().alphas_cumprod[0])
    assert scheduler.config.sigma_min == pytest.approx(((1 - alpha_bar) / alpha_bar) ** 0.5, rel=1e-3)


@pytest.mark.parametrize("clip", [True, False])
def test_estimates_are_clipped_where_the_teachers_are(clip: bool) -> None:
    teacher = DDIMScheduler(clip_sample=clip)
    assert ConsistencyScheduler.from_teacher(teacher).config.clip_denoised is clip
    assert ConsistencyScheduler.from_teacher(teacher, clip_denoised=not clip).config.clip_denoised is not clip
    assert ConsistencyScheduler.from_teacher(EulerDiscreteScheduler()).config.clip_denoised is True


@pytest.mark.parametrize(
    "kind", [DDIMScheduler, EulerDiscreteScheduler, EDMEulerScheduler, FlowMatchEulerDiscreteScheduler,
             ScoreSdeVeScheduler],
)  # fmt: skip
def test_the_config_of_a_teacher_is_refused_wherever_it_comes_from(kind: Any, tmp_path: Path) -> None:
    kind().save_pretrained(tmp_path)
    for config in (kind().config, kind.load_config(tmp_path)):
        with pytest.raises(ValueError, match=r"made by `from_teacher\(scheduler\)`"):
            ConsistencyScheduler.from_config(config)


@pytest.mark.parametrize("boundary", ["euler", "lcm"])
def test_a_pipeline_that_does_not_scale_is_told_once(boundary: str, caplog: pytest.LogCaptureFixture) -> None:
    scheduler = ConsistencyScheduler.from_teacher(DDPMScheduler(), boundary=boundary)
    scheduler.set_timesteps(3)
    state = torch.zeros(1, 3, 8, 8)
    for timestep in scheduler.timesteps:
        state = scheduler.step(state, timestep, state).prev_sample
    assert caplog.text.count("without `scale_model_input`") == (boundary == "euler")


def test_unsupported_teacher_is_refused() -> None:
    from diffusers import UnCLIPScheduler

    with pytest.raises(ValueError, match="UnCLIPScheduler"):
        ConsistencyScheduler.from_teacher(UnCLIPScheduler())


# In stock pipelines --------------------------------------------------------------------------------------------------


def test_stable_diffusion_pipeline_samples_the_consistency_function() -> None:
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=4,
        layers_per_block=1,
        block_out_channels=(8, 8),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=4,
        norm_num_groups=4,
    ).eval()
    vae = AutoencoderKL(
        block_out_channels=(4, 4),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=2,
    ).eval()
    teacher = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    scheduler = ConsistencyScheduler.from_teacher(teacher, clip_denoised=False)
    parts = {"text_encoder": None, "tokenizer": None, "safety_checker": None, "feature_extractor": None}
    pipe = StableDiffusionPipeline(vae=vae, unet=unet, scheduler=scheduler, requires_safety_checker=False, **parts)
    pipe.set_progress_bar_config(disable=True)
    prompt = torch.randn(1, 5, 8)
    generator = torch.Generator().manual_seed(3)
    arguments = {"prompt_embeds": prompt, "guidance_scale": 1.0, "num_inference_steps": 2, "height": 8, "width": 8}
    latents = pipe(**arguments, generator=generator, output_type="latent").images

    generator.manual_seed(3)
    f, (first, second, _) = Denoiser(unet, scheduler.boundary), scheduler.sigmas
    with torch.no_grad():
        x = torch.randn(latents.shape, generator=generator) * scheduler.config.sigma_max
        x = f(x, first, encoder_hidden_states=prompt)
        noise = torch.randn(latents.shape, generator=generator)
        x = x + (second**2 - scheduler.config.sigma_min**2) ** 0.5 * noise
        x = f(x, second, encoder_hidden_states=prompt)
    torch.testing.assert_close(latents, x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["vp-epsilon", "edm", "flow", "consistency"])
def test_stock_consistency_pipeline_takes_our_scheduler(name: str, make_unet: Callable[..., Any]) -> None:
    images = []
    for pipeline in (ConsistencyModelPipeline, ConsistencyPipeline):
        pipe = pipeline(make_unet(), ConsistencyScheduler.from_teacher(TEACHERS[name]))
        pipe.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        images.append(pipe(batch_size=2, num_inference_steps=3, generator=generator, output_type="np").images)
    assert np.array_equal(*images)


def test_stock_timesteps_are_the_indices_of_the_levels():
    grid = ConsistencyScheduler(num_train_timesteps=18)
    grid.set_timesteps(timesteps=[9, 4, 0])
    stored = grid.sigmas[:3].tolist()
    scheduler = ConsistencyScheduler(num_train_timesteps=18, few_step_sigmas={"3": stored, "2": [80.0, 1.234]})
    assert scheduler.stock_timesteps(3) == [9, 4, 0]
    assert scheduler.stock_timesteps(1) == [0]
    assert scheduler.stock_timesteps(4) == [12, 8, 4, 0]  # as stock spreads them
    assert scheduler.stock_timesteps(2) is None  # not on the grid
    assert ConsistencyScheduler(few_step_sigmas={"1": [grid.sigmas[1].item()]}).stock_timesteps(1) is None
    assert ConsistencyScheduler(family="edm", prediction_type="epsilon").stock_timesteps(1) is None
