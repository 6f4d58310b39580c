from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import (
    CMStochasticIterativeScheduler,
    ConsistencyModelPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    EDMEulerScheduler,
    ImagePipelineOutput,
    ScoreSdeVeScheduler,
    UNet2DModel,
)
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

from cm_diffusers import ConsistencyPipeline, ConsistencyScheduler
from cm_diffusers.preconditioning import Denoiser

SCHEDULES = [
    {"num_inference_steps": 1},
    {"num_inference_steps": 2},
    {"num_inference_steps": 4},
    {"num_inference_steps": None, "timesteps": [22, 0]},
]


def quiet(pipe: DiffusionPipeline) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def vp_pipeline(unet: UNet2DModel, **config: Any) -> ConsistencyPipeline:
    """A student that no stock class represents."""
    return quiet(ConsistencyPipeline(unet, ConsistencyScheduler.from_teacher(DDPMScheduler()), **config))


def cm_pipeline(unet: UNet2DModel, **config: Any) -> ConsistencyPipeline:
    """A student that stock diffusers represents exactly."""
    return quiet(ConsistencyPipeline(unet, ConsistencyScheduler(), **config))


def images_of(pipe: DiffusionPipeline, seed: int = 0, **arguments: Any) -> np.ndarray:
    arguments = {"batch_size": 2, "output_type": "np", **arguments}
    return quiet(pipe)(generator=torch.Generator().manual_seed(seed), **arguments).images


# Stock checkpoints, and ours in stock diffusers ----------------------------------------------------------------------


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("num_classes", [None, 5])
def test_stock_checkpoint_gives_the_same_images_here(
    num_classes: int | None, schedule: dict[str, Any], make_unet: Callable[..., UNet2DModel], tmp_path: Path
) -> None:
    stock = ConsistencyModelPipeline(make_unet(num_class_embeds=num_classes), CMStochasticIterativeScheduler())
    stock.save_pretrained(tmp_path)
    ours = ConsistencyPipeline.from_pretrained(tmp_path)
    arguments = schedule if num_classes is None else {**schedule, "class_labels": [1, 4]}
    assert np.array_equal(images_of(ours, **arguments), images_of(stock, **arguments))


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("num_classes", [None, 5])
def test_our_consistency_student_gives_the_same_images_in_stock_diffusers(
    num_classes: int | None, schedule: dict[str, Any], make_unet: Callable[..., UNet2DModel], tmp_path: Path
) -> None:
    ours = cm_pipeline(make_unet(num_class_embeds=num_classes))
    ours.save_pretrained(tmp_path)
    stock = DiffusionPipeline.from_pretrained(tmp_path)
    assert type(stock) is ConsistencyModelPipeline
    arguments = schedule if num_classes is None else {**schedule, "class_labels": [1, 4]}
    assert np.array_equal(images_of(ours, **arguments), images_of(stock, **arguments))


def test_range_of_sigma_and_grid_are_kept_in_stock_diffusers(unet: UNet2DModel, tmp_path: Path) -> None:
    scheduler = ConsistencyScheduler(sigma_min=0.01, sigma_max=50.0, num_train_timesteps=18)
    ours = ConsistencyPipeline(unet, scheduler)
    ours.save_pretrained(tmp_path)
    stock = DiffusionPipeline.from_pretrained(tmp_path)
    arguments = {"num_inference_steps": 3}
    assert np.array_equal(images_of(ours, **arguments), images_of(stock, **arguments))


def test_vp_student_is_saved_under_our_names(unet: UNet2DModel, tmp_path: Path) -> None:
    vp_pipeline(unet).save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["_class_name"] == "ConsistencyPipeline"
    assert index["scheduler"][1] == "ConsistencyScheduler"


@pytest.mark.parametrize("schedule", [*SCHEDULES[:3], {"sigmas": [80.0, 0.821]}])
def test_vp_student_loads_to_the_same_bits(schedule: dict[str, Any], unet: UNet2DModel, tmp_path: Path) -> None:
    pipe = vp_pipeline(unet)
    pipe.save_pretrained(tmp_path)
    loaded = ConsistencyPipeline.from_pretrained(tmp_path)
    assert np.array_equal(images_of(loaded, **schedule), images_of(pipe, **schedule))


@pytest.mark.parametrize("build", [vp_pipeline, cm_pipeline])
def test_null_class_label_survives_saving(
    build: Callable[..., ConsistencyPipeline], class_unet: UNet2DModel, tmp_path: Path
) -> None:
    build(class_unet, null_class_label=4).save_pretrained(tmp_path)
    assert ConsistencyPipeline.from_pretrained(tmp_path).config.null_class_label == 4


def test_saved_index_names_no_folder_of_this_machine(unet: UNet2DModel, tmp_path: Path) -> None:
    vp_pipeline(unet).save_pretrained(tmp_path / "first")
    ConsistencyPipeline.from_pretrained(tmp_path / "first").save_pretrained(tmp_path / "second")
    for file in (tmp_path / "second").glob("*.json"):
        assert str(tmp_path) not in file.read_text()


def test_from_pipe_upgrades_a_stock_pipeline(unet: UNet2DModel) -> None:
    stock = ConsistencyModelPipeline(unet, CMStochasticIterativeScheduler(sigma_max=60.0))
    ours = ConsistencyPipeline.from_pipe(stock)
    assert isinstance(ours.scheduler, ConsistencyScheduler)
    assert ours.unet is unet
    assert np.array_equal(images_of(ours, num_inference_steps=2), images_of(stock, num_inference_steps=2))


def test_from_pipe_keeps_the_null_class_label(class_unet: UNet2DModel) -> None:
    pipe = vp_pipeline(class_unet, null_class_label=4)
    assert ConsistencyPipeline.from_pipe(pipe).config.null_class_label == 4


def test_diffusion_scheduler_is_refused(unet: UNet2DModel) -> None:
    with pytest.raises(ValueError, match="ConsistencyScheduler.*DDPMScheduler"):
        ConsistencyPipeline(unet, DDPMScheduler())


# Sampling ------------------------------------------------------------------------------------------------------------


def test_images_are_multistep_consistency_sampling(unet: UNet2DModel) -> None:
    pipe, generator = vp_pipeline(unet), torch.Generator().manual_seed(0)
    f, sigma_min = Denoiser(unet, pipe.scheduler.boundary), pipe.scheduler.config.sigma_min
    with torch.no_grad():
        x = f(80 * torch.randn(2, 3, 8, 8, generator=generator), 80.0).clamp(-1, 1)
        x = x + (2.0**2 - sigma_min**2) ** 0.5 * torch.randn(2, 3, 8, 8, generator=generator)
        x = f(x, 2.0).clamp(-1, 1)
    generator.manual_seed(0)
    image = pipe(batch_size=2, sigmas=[80.0, 2.0], generator=generator, output_type="pt").images
    torch.testing.assert_close(image, x / 2 + 0.5, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("build", [vp_pipeline, cm_pipeline])
@pytest.mark.parametrize("num_classes", [None, 5])
def test_each_image_depends_on_its_own_generator_alone(
    num_classes: int | None, build: Callable[..., ConsistencyPipeline], make_unet: Callable[..., UNet2DModel]
) -> None:
    pipe = build(make_unet(num_class_embeds=num_classes))

    def sample(seeds: list[int]) -> torch.Tensor:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return pipe(len(seeds), num_inference_steps=2, generator=generators, output_type="pt").images

    together = sample([3, 4, 5])
    for i, seed in enumerate([3, 4, 5]):
        torch.testing.assert_close(sample([seed])[0], together[i], rtol=0, atol=1e-5)


def test_latents_are_unit_variance_noise(unet: UNet2DModel) -> None:
    pipe = vp_pipeline(unet)
    latents = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    assert np.array_equal(pipe(2, latents=latents, output_type="np").images, images_of(pipe, seed=0))


def test_given_latents_are_not_changed(unet: UNet2DModel) -> None:
    latents = torch.ones(1, 3, 8, 8)
    vp_pipeline(unet)(latents=latents, num_inference_steps=2, output_type="np")
    assert torch.equal(latents, torch.ones(1, 3, 8, 8))


def test_network_sees_unit_variance_at_the_first_step(unet: UNet2DModel) -> None:
    seen = []
    unet.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    vp_pipeline(unet)(batch_size=16, output_type="latent")
    assert seen[0].std() == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize("channels", [1, 2, 4])
def test_any_number_of_channels(channels: int, make_unet: Callable[..., UNet2DModel]) -> None:
    pipe = vp_pipeline(make_unet(in_channels=channels, out_channels=channels))
    assert images_of(pipe).shape == (2, 8, 8, channels)


def test_network_that_predicts_variance_is_sampled_by_its_mean(make_unet: Callable[..., UNet2DModel]) -> None:
    assert images_of(vp_pipeline(make_unet(out_channels=6)), num_inference_steps=2).shape == (2, 8, 8, 3)


def test_sample_size_may_be_a_rectangle(make_unet: Callable[..., UNet2DModel]) -> None:
    assert images_of(vp_pipeline(make_unet(sample_size=(8, 12)))).shape == (2, 8, 12, 3)


def test_height_and_width_replace_the_sample_size(unet: UNet2DModel) -> None:
    assert images_of(vp_pipeline(unet), height=12, width=4).shape == (2, 12, 4, 3)


@pytest.mark.parametrize("output_type", ["pil", "np", "pt", "latent"])
def test_half_precision_unet(output_type: str, unet: UNet2DModel) -> None:
    images = vp_pipeline(unet.to(torch.bfloat16))(num_inference_steps=2, output_type=output_type).images
    image = np.array(images[0]) if output_type == "pil" else torch.as_tensor(images).float().numpy()
    assert np.isfinite(image).all()


def test_half_precision_images_are_close_to_full(make_unet: Callable[..., UNet2DModel]) -> None:
    latents = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    build = ConsistencyScheduler.from_teacher
    images = [
        quiet(ConsistencyPipeline(make_unet().to(dtype), build(DDPMScheduler(prediction_type="v_prediction"))))(
            latents=latents, output_type="pt"
        ).images.float()
        for dtype in (torch.float32, torch.bfloat16)
    ]
    torch.testing.assert_close(*images, rtol=0, atol=0.05)


# Speed and memory, through diffusers' own hooks ----------------------------------------------------------------------


@pytest.fixture
def attention_pipeline(make_unet: Callable[..., UNet2DModel]) -> ConsistencyPipeline:
    return vp_pipeline(make_unet(down_block_types=("AttnDownBlock2D",), up_block_types=("AttnUpBlock2D",)))


@pytest.mark.parametrize("steps", [1, 3])
def test_compiled_unet_gives_the_same_images(attention_pipeline: ConsistencyPipeline, steps: int) -> None:
    torch._dynamo.reset()
    expected = images_of(attention_pipeline, num_inference_steps=steps)
    attention_pipeline.unet.compile(backend="aot_eager", fullgraph=True)
    np.testing.assert_allclose(images_of(attention_pipeline, num_inference_steps=steps), expected, atol=1e-5)


def test_offloaded_pipeline_gives_the_same_images(attention_pipeline: ConsistencyPipeline) -> None:
    expected = images_of(attention_pipeline, num_inference_steps=2)
    attention_pipeline.enable_model_cpu_offload(device="cpu")
    assert hasattr(attention_pipeline.unet, "_hf_hook")
    np.testing.assert_array_equal(images_of(attention_pipeline, num_inference_steps=2), expected)


def test_attention_kernels_give_the_same_images(attention_pipeline: ConsistencyPipeline) -> None:
    flash, math = SDPBackend.FLASH_ATTENTION, SDPBackend.MATH
    images, seen = {}, {}
    for backend in (flash, math):
        with sdpa_kernel(backend), profile(activities=[ProfilerActivity.CPU]) as profiler:
            images[backend] = images_of(attention_pipeline)
        seen[backend] = {event.key for event in profiler.key_averages()}
    assert "aten::_scaled_dot_product_flash_attention_for_cpu" in seen[flash] - seen[math]
    np.testing.assert_allclose(images[flash], images[math], atol=1e-5)


# Class labels --------------------------------------------------------------------------------------------------------


def labels_seen(unet: UNet2DModel) -> list[list[int]]:
    """A list that fills with the labels of each network evaluation."""
    seen: list[list[int]] = []

    def keep(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(kwargs["class_labels"].tolist())

    unet.register_forward_pre_hook(keep, with_kwargs=True)
    return seen


@pytest.mark.parametrize(
    ("labels", "expected"),
    [(2, [2, 2, 2]), ([3], [3, 3, 3]), ([0, 1, 4], [0, 1, 4]), (torch.tensor([4, 0, 2]), [4, 0, 2])],
)
def test_class_labels_reach_the_network(labels: Any, expected: list[int], class_unet: UNet2DModel) -> None:
    seen = labels_seen(class_unet)
    vp_pipeline(class_unet)(3, labels, num_inference_steps=2, output_type="latent")
    assert seen == [expected, expected]


def test_random_labels_depend_on_the_generator_alone(class_unet: UNet2DModel) -> None:
    pipe, seen = vp_pipeline(class_unet), labels_seen(class_unet)
    for global_seed in (1, 2):
        torch.manual_seed(global_seed)
        images_of(pipe, seed=7, batch_size=32)
    images_of(pipe, seed=8, batch_size=32)
    assert seen[0] == seen[1] != seen[2]
    assert set(seen[0]) == set(range(5))


@pytest.mark.parametrize("null", [1, 4])
def test_random_labels_leave_out_the_null_class(null: int, class_unet: UNet2DModel) -> None:
    seen = labels_seen(class_unet)
    pipe = vp_pipeline(class_unet, null_class_label=null)
    images_of(pipe, batch_size=64)
    assert set(seen[0]) == set(pipe.classes) == set(range(5)) - {null}


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([1, 2], "Got 2 `class_labels` for `batch_size=3`"),
        (5, r"\[0, 5\)"),
        (-1, r"\[0, 5\)"),
        ([0.5, 1.0, 2.0], "integers"),
        (True, "integers"),
    ],
)
def test_bad_class_labels_are_refused(labels: Any, message: str, class_unet: UNet2DModel) -> None:
    with pytest.raises(ValueError, match=message):
        vp_pipeline(class_unet)(3, labels)


def test_class_labels_of_an_unconditional_model_are_refused(unet: UNet2DModel) -> None:
    with pytest.raises(ValueError, match="not class-conditional"):
        vp_pipeline(unet)(class_labels=0)


# Guidance ------------------------------------------------------------------------------------------------------------


def test_guidance_of_one_is_none(class_unet: UNet2DModel) -> None:
    guided, plain = vp_pipeline(class_unet, null_class_label=4), vp_pipeline(class_unet)
    arguments = {"class_labels": [0, 1], "num_inference_steps": 2}
    assert np.array_equal(images_of(guided, guidance_scale=1.0, **arguments), images_of(plain, **arguments))


def test_guidance_needs_a_null_class(class_unet: UNet2DModel) -> None:
    with pytest.raises(ValueError, match="null_class_label"):
        vp_pipeline(class_unet)(class_labels=0, guidance_scale=2.0)


@pytest.mark.parametrize("scale", [0.0, 0.5, 3.0])
def test_guidance_extrapolates_from_the_null_class(scale: float, class_unet: UNet2DModel) -> None:
    scheduler = ConsistencyScheduler.from_teacher(EDMEulerScheduler(), clip_denoised=False)
    pipe = quiet(ConsistencyPipeline(class_unet, scheduler, null_class_label=4))
    latents = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))

    def sample(labels: list[int], guidance_scale: float = 1.0) -> torch.Tensor:
        return pipe(
            2, labels, guidance_scale=guidance_scale, latents=latents, sigmas=[80.0], output_type="latent"
        ).images

    with_label, with_null = sample([0, 1]), sample([4, 4])
    expected = with_null + scale * (with_label - with_null)
    torch.testing.assert_close(sample([0, 1], scale), expected, rtol=1e-5, atol=1e-5)


# Output --------------------------------------------------------------------------------------------------------------


def test_output_is_a_dataclass_or_a_tuple(unet: UNet2DModel) -> None:
    pipe = vp_pipeline(unet)
    assert isinstance(pipe(output_type="np"), ImagePipelineOutput)
    assert isinstance(pipe(output_type="np", return_dict=False), tuple)


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB"), (4, "RGBA")])
def test_pil_images(channels: int, mode: str, make_unet: Callable[..., UNet2DModel]) -> None:
    pipe = vp_pipeline(make_unet(in_channels=channels, out_channels=channels))
    images = pipe(2, output_type="pil").images
    assert [(type(i), i.mode, i.size) for i in images] == [(PIL.Image.Image, mode, (8, 8))] * 2


def test_two_channels_have_no_pil_form(make_unet: Callable[..., UNet2DModel]) -> None:
    with pytest.raises(ValueError, match="2 channels"):
        vp_pipeline(make_unet(in_channels=2, out_channels=2))(output_type="pil")


def test_output_types_show_the_same_image(unet: UNet2DModel) -> None:
    pipe = vp_pipeline(unet)
    latent = images_of(pipe, output_type="latent")
    pt = images_of(pipe, output_type="pt")
    torch.testing.assert_close(pt, latent / 2 + 0.5)
    array = images_of(pipe, output_type="np")
    assert np.array_equal(array, pt.permute(0, 2, 3, 1).numpy())
    pil = np.stack([np.array(image) for image in images_of(pipe, output_type="pil")])
    assert np.abs(pil / 255 - array).max() <= 0.5 / 255 + 1e-6


def test_images_of_other_ranges_are_scaled_to_unit_range(unet: UNet2DModel) -> None:
    pipe = quiet(ConsistencyPipeline(unet, ConsistencyScheduler.from_teacher(ScoreSdeVeScheduler())))
    latent, pt = images_of(pipe, output_type="latent"), images_of(pipe, output_type="pt")
    torch.testing.assert_close(pt, latent.clamp(0, 1))


# Callback ------------------------------------------------------------------------------------------------------------


def test_callback_runs_after_every_step(unet: UNet2DModel) -> None:
    calls = []

    def callback(pipe: Any, step: int, timestep: torch.Tensor, tensors: dict[str, torch.Tensor]) -> None:
        calls.append((step, float(timestep), tensors["latents"].clone()))

    pipe = vp_pipeline(unet)
    result = pipe(num_inference_steps=3, callback_on_step_end=callback, output_type="latent").images
    assert [step for step, *_ in calls] == [0, 1, 2]
    assert [t for _, t, _ in calls] == pipe.scheduler.timesteps.tolist()
    assert torch.equal(calls[-1][2], result)
    assert pipe.num_timesteps == 3


def test_latents_that_the_callback_returns_are_taken(unet: UNet2DModel) -> None:
    def callback(pipe: Any, step: int, timestep: Any, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"latents": torch.full_like(tensors["latents"], 0.25)}

    result = vp_pipeline(unet)(callback_on_step_end=callback, output_type="latent").images
    assert torch.equal(result, torch.full((1, 3, 8, 8), 0.25))


def test_callback_can_stop_sampling(unet: UNet2DModel) -> None:
    steps = []

    def callback(pipe: Any, step: int, timestep: Any, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        steps.append(step)
        pipe._interrupt = step == 1
        return {}

    pipe = vp_pipeline(unet)
    pipe(num_inference_steps=4, callback_on_step_end=callback, output_type="latent")
    assert steps == [0, 1]
    pipe(num_inference_steps=1, callback_on_step_end=callback, output_type="latent")
    assert steps == [0, 1, 0]


def test_callback_gets_only_what_there_is(unet: UNet2DModel) -> None:
    with pytest.raises(ValueError, match="prompt_embeds"):
        vp_pipeline(unet)(callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"])


# Bad input -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size"),
        ({"batch_size": 2.0}, "batch_size"),
        ({"batch_size": True}, "batch_size"),
        ({"output_type": "jpeg"}, "output_type"),
        ({"num_inference_steps": 0}, "num_inference_steps"),
        ({"num_inference_steps": None}, "num_inference_steps"),
        ({"num_inference_steps": 1001}, "num_inference_steps"),
        ({"timesteps": [0, 10]}, "timesteps"),
        ({"sigmas": [1000.0]}, "sigmas"),
        ({"sigmas": [80.0], "timesteps": [900]}, "exactly one"),
        ({"batch_size": 2, "generator": [torch.Generator()]}, "1 generators for `batch_size=2`"),
        ({"latents": torch.zeros(2, 3, 8, 8)}, "latents"),
        ({"latents": torch.zeros(1, 1, 8, 8)}, "latents"),
        ({"latents": torch.zeros(1, 3, 8, 4)}, "latents"),
        ({"guidance_scale": 2.0}, "guidance_scale"),
    ],
)
def test_bad_input_is_refused(arguments: dict[str, Any], message: str, unet: UNet2DModel) -> None:
    with pytest.raises(ValueError, match=message):
        vp_pipeline(unet)(**arguments)


def test_size_is_needed_where_the_model_has_none(make_unet: Callable[..., UNet2DModel]) -> None:
    with pytest.raises(ValueError, match="`height` and `width`"):
        vp_pipeline(make_unet(sample_size=None))()


def test_sizes_that_the_network_cannot_halve_are_refused(make_unet: Callable[..., UNet2DModel]) -> None:
    levels = {"down_block_types": ("DownBlock2D",) * 3, "up_block_types": ("UpBlock2D",) * 3}
    pipe = vp_pipeline(make_unet(block_out_channels=(8, 8, 8), **levels))
    assert pipe(height=8, width=12, output_type="np").images.shape == (1, 8, 12, 3)
    with pytest.raises(ValueError, match="multiples of 4 for this model, got 8 x 10"):
        pipe(height=8, width=10)


def test_latents_give_the_size_where_the_model_has_none(make_unet: Callable[..., UNet2DModel]) -> None:
    pipe = vp_pipeline(make_unet(sample_size=None))
    assert pipe(latents=torch.zeros(1, 3, 8, 4), output_type="np").images.shape == (1, 8, 4, 3)
