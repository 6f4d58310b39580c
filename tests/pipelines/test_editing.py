"""The pipelines that edit, against the published algorithm and against each other."""

from __future__ import annotations

from typing import Any

import diffusers
import numpy as np
import PIL.Image
import pytest
import torch
from closed_form import PointMixture
from conftest import build_unet
from diffusers import CMStochasticIterativeScheduler, ConsistencyModelPipeline, DDPMScheduler
from test_known import orthogonal
from torch import Tensor

from cm_diffusers import (
    ConsistencyColorizePipeline,
    ConsistencyDenoisePipeline,
    ConsistencyImg2ImgPipeline,
    ConsistencyInpaintPipeline,
    ConsistencyInterpolationPipeline,
    ConsistencyPipeline,
    ConsistencyRestorationPipeline,
    ConsistencyScheduler,
    ConsistencySuperResolutionPipeline,
    Known,
)
from cm_diffusers.network_config import read_preconditioning
from cm_diffusers.noise_levels import karras_grid
from cm_diffusers.pipelines.inputs import read_images, read_masks
from cm_diffusers.pipelines.known import LUMA_WEIGHTS, luma
from cm_diffusers.pipelines.pipeline_consistency_denoise import estimate_noise_level
from cm_diffusers.pipelines.pipeline_consistency_interpolation import slerp
from cm_diffusers.preconditioning import Denoiser
from cm_diffusers.solvers import follow

SIGMAS = [80.0, 24.4, 5.84, 0.9]
EDITS = ("inpaint", "colorize", "superres")


def quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def pipeline(kind: type, scheduler: Any = None, **network: Any) -> Any:
    return quiet(kind(build_unet(**network), ConsistencyScheduler() if scheduler is None else scheduler))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pictures(count: int = 2, height: int = 8, width: int = 8, channels: int = 3) -> Tensor:
    return torch.rand(count, channels, height, width, generator=seeded(5))


def left_half(height: int = 8, width: int = 8) -> Tensor:
    mask = torch.zeros(1, 1, height, width)
    mask[..., : width // 2] = 1
    return mask


def means(images: Tensor, factor: int) -> Tensor:
    return torch.nn.functional.avg_pool2d(images, factor)


def edit(name: str, image: Tensor, pipe: Any = None, **options: Any) -> Any:
    """One of the edits that put something back, of whole images with values in [0, 1]."""
    kinds = {
        "inpaint": ConsistencyInpaintPipeline, "colorize": ConsistencyColorizePipeline,
        "superres": ConsistencySuperResolutionPipeline,
    }  # fmt: skip
    pipe = quiet(kinds[name].from_pipe(pipe)) if pipe is not None else pipeline(kinds[name])
    options = {"generator": seeded(), "output_type": "pt", **options}
    size = image.shape[-2:]
    if name == "inpaint":
        return pipe(image, left_half(*size), height=size[0], width=size[1], **options).images
    if name == "colorize":
        return pipe(luma(image), height=size[0], width=size[1], **options).images
    return pipe(means(image, 2), factor=2, **options).images


def measured(name: str, image: Tensor) -> Tensor:
    """What an edit keeps."""
    if name == "inpaint":
        return image[..., image.shape[-1] // 2 :]
    return luma(image) if name == "colorize" else means(image, 2)


# The published algorithm --------------------------------------------------------------------------------------------


def published(name: str, y: Tensor, pipe: Any, sigmas: list[float], noises: list[Tensor]) -> list[Tensor]:
    """Algorithm 4 of Song et al. 2023, read literally, in float64: the clean image of each step, after what is known.

    `y` has values in [-1, 1].
    """
    f = Denoiser(pipe.unet, pipe.scheduler.boundary)
    if name == "colorize":
        q = orthogonal(torch.tensor(LUMA_WEIGHTS, dtype=torch.float64))
        forward = lambda x: torch.einsum("bchw,cd->bdhw", x, q)  # noqa: E731
        back = lambda x: torch.einsum("bdhw,cd->bchw", x, q)  # noqa: E731
        omega = torch.tensor([1.0, 0, 0], dtype=torch.float64).view(1, 3, 1, 1)
    elif name == "superres":
        q = orthogonal(torch.ones(4, dtype=torch.float64))
        forward = lambda x: x.unfold(2, 2, 2).unfold(3, 2, 2).flatten(4) @ q  # noqa: E731
        back = lambda x: (  # noqa: E731
            (x @ q.T).unflatten(4, (2, 2)).permute(0, 1, 2, 4, 3, 5).reshape(y.shape)
        )
        omega = torch.tensor([1.0, 0, 0, 0], dtype=torch.float64)
    else:
        forward = back = lambda x: x  # noqa: E731
        omega = 1 - left_half().double()
    known = omega * forward(y)
    x = back(known) + sigmas[0] * noises[0]
    found = []
    for sigma, noise, lower in zip(sigmas, [*noises[1:], None], [*sigmas[1:], None], strict=True):
        clean = f(x.float(), sigma).double().clamp(-1, 1)
        found.append(back(known + (1 - omega) * forward(clean)))
        if noise is not None:
            x = found[-1] + (lower**2 - pipe.scheduler.config.sigma_min**2) ** 0.5 * noise
    return found


@pytest.mark.parametrize("name", EDITS)
def test_every_step_is_the_published_algorithms(name):
    pipe, image = pipeline(ConsistencyPipeline), pictures()
    draws = seeded()
    noises = [torch.randn(2, 3, 8, 8, generator=draws).double() for _ in SIGMAS]
    expected = published(name, image.double() * 2 - 1, pipe, SIGMAS, noises)
    states = []

    def keep(pipe, step, timestep, tensors):
        states.append(tensors["latents"].double())

    last = edit(name, image, pipe, sigmas=SIGMAS, output_type="latent", callback_on_step_end=keep)
    torch.testing.assert_close(last.double(), expected[-1], rtol=0, atol=1e-5)
    for step, state in enumerate(states[:-1]):
        added = (SIGMAS[step + 1] ** 2 - 0.002**2) ** 0.5 * noises[step + 1]
        # Rounding is relative to the noise that hides the image.
        torch.testing.assert_close(state - added, expected[step], rtol=0, atol=1e-5)


def test_the_first_state_of_inpainting_has_zeros_under_the_mask_and_not_black():
    pipe, states = pipeline(ConsistencyPipeline), []
    pipe.unet.register_forward_pre_hook(lambda _, arguments: states.append(arguments[0]))
    edit("inpaint", pictures(), pipe, latents=torch.zeros(2, 3, 8, 8), sigmas=[0.5])
    assert states[0][..., :4].abs().max() == 0 < states[0][..., 4:].abs().max()


# What is known comes back -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("size", [(8, 8), (8, 16), (16, 4)], ids=str)
@pytest.mark.parametrize("name", EDITS)
def test_what_is_known_comes_back(name, size, steps):
    image = pictures(3, *size)
    result = edit(name, image, num_inference_steps=steps)
    torch.testing.assert_close(measured(name, result), measured(name, image), rtol=0, atol=1e-5)
    assert float((result - image).abs().mean()) > 0.02
    assert result.min() >= 0 and result.max() <= 1


@pytest.mark.parametrize(
    "scheduler",
    [diffusers.DDPMScheduler(), diffusers.FlowMatchEulerDiscreteScheduler(), diffusers.EDMEulerScheduler()],
    ids=lambda scheduler: type(scheduler).__name__,
)
@pytest.mark.parametrize("name", EDITS)
def test_every_family_of_students_edits(name, scheduler):
    pipe = pipeline(ConsistencyPipeline, ConsistencyScheduler.from_teacher(scheduler))
    image = pictures()
    torch.testing.assert_close(measured(name, edit(name, image, pipe)), measured(name, image), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", EDITS)
def test_students_whose_states_have_unit_variance_edit(name):
    scheduler = ConsistencyScheduler.from_teacher(diffusers.DDPMScheduler(), boundary="lcm")
    image, pipe = pictures(), pipeline(ConsistencyPipeline, scheduler)
    states = []

    def keep(pipe, step, timestep, tensors):
        states.append(tensors["latents"] * scheduler.state_scale(scheduler.sigmas[step + 1]))

    result = edit(name, image, pipe, sigmas=[80.0, 0.5, 0.1], callback_on_step_end=keep)
    torch.testing.assert_close(measured(name, result), measured(name, image), rtol=0, atol=1e-5)
    noise = measured(name, states[1] / 2 + 0.5) - measured(name, image)  # of the last level, on what is known
    alike = measured(name, 0.05 * torch.randn(64, *image.shape[1:], generator=seeded()))
    assert float(noise.std()) == pytest.approx(float(alike.std()), rel=0.25)


@pytest.mark.parametrize("name", EDITS)
def test_one_image_and_several_results(name):
    image = pictures(1)
    several = edit(name, image, batch_size=3, generator=[seeded(i) for i in range(3)])
    for i in range(3):
        torch.testing.assert_close(several[i : i + 1], edit(name, image, generator=[seeded(i)]), rtol=0, atol=1e-5)
    assert not torch.equal(several[0], several[1])
    torch.testing.assert_close(measured(name, several), measured(name, image.expand(3, -1, -1, -1)), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", EDITS)
def test_what_is_known_comes_back_through_half_precision(name, dtype):
    image = pictures()
    result = edit(name, image, ConsistencyPipeline(build_unet().to(dtype), ConsistencyScheduler()))
    torch.testing.assert_close(measured(name, result), measured(name, image), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", EDITS)
def test_flow_maps_edit(name):
    scheduler = ConsistencyScheduler.from_teacher(diffusers.EDMEulerScheduler(), flow_map=True, boundary="euler")
    pipe = ConsistencyPipeline(build_unet(class_embed_type="timestep"), scheduler)
    image = pictures()
    for _ in range(3):
        result = edit(name, image, pipe, num_inference_steps=3)
    torch.testing.assert_close(measured(name, result), measured(name, image), rtol=0, atol=1e-5)
    assert len(pipe.unet.class_embedding._forward_pre_hooks) == 1


def test_images_without_a_class_have_none_where_that_was_trained():
    pipe = ConsistencyPipeline(build_unet(num_class_embeds=5), ConsistencyScheduler(), null_class_label=4)
    image, results = pictures(), {}
    for label in (None, 4, 0):
        results[label] = edit("inpaint", image, pipe, class_labels=label)
    assert torch.equal(results[None], results[4]) and not torch.equal(results[None], results[0])
    with pytest.raises(ValueError, match="leads towards a class"):
        edit("inpaint", image, pipe, guidance_scale=2.0)


@pytest.mark.parametrize("name", EDITS)
def test_stock_pipelines_edit_without_copies(name):
    stock = ConsistencyModelPipeline(build_unet(), CMStochasticIterativeScheduler())
    image = pictures()
    result = edit(name, image, stock, num_inference_steps=2)
    torch.testing.assert_close(measured(name, result), measured(name, image), rtol=0, atol=1e-5)


def test_from_pipe_shares_weights_and_takes_changes():
    pipe = ConsistencyPipeline(build_unet(num_class_embeds=5), ConsistencyScheduler(), null_class_label=4)
    edits = ConsistencyColorizePipeline.from_pipe(pipe)
    assert edits.unet is pipe.unet and edits.config.null_class_label == 4
    assert ConsistencyColorizePipeline.from_pipe(pipe, null_class_label=3).config.null_class_label == 3
    with pytest.raises(TypeError):
        ConsistencyColorizePipeline.from_pipe(pipe, vae=None)


# Single edits -------------------------------------------------------------------------------------------------------


def test_grey_comes_in_every_form():
    grey = (luma(pictures(1)) * 255).round() / 255
    array = grey[0, 0].numpy()
    picture = PIL.Image.fromarray((array * 255).round().astype(np.uint8))
    pipe = pipeline(ConsistencyColorizePipeline)
    forms = [grey, array, picture, [picture], grey.expand(-1, 3, -1, -1), picture.convert("RGB")]
    results = [pipe(form, generator=seeded(), output_type="pt").images for form in forms]
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=0, atol=1e-5)
    assert results[0].shape == (1, 3, 8, 8)


def test_bytes_and_floats_say_the_same():
    bytes_ = (pictures(1) * 255).round().to(torch.uint8)
    array = bytes_[0].permute(1, 2, 0).numpy()
    forms = [bytes_ / 255, bytes_, array, array / 255, [array], bytes_[0], PIL.Image.fromarray(array)]
    for name in EDITS[:2]:
        pipe = pipeline(ConsistencyImg2ImgPipeline if name == "inpaint" else ConsistencyColorizePipeline)
        results = [pipe(form, generator=seeded(), output_type="pt").images for form in forms]
        for result in results[1:]:
            torch.testing.assert_close(result, results[0], rtol=0, atol=1e-5)
    noisy = [pipeline(ConsistencyDenoisePipeline)(form, 0.1, output_type="pt").images for form in forms]
    torch.testing.assert_close(noisy[2], noisy[0], rtol=0, atol=1e-5)


def test_masks_are_black_and_white_in_every_way():
    picture = torch.zeros(8, 8, dtype=torch.uint8)
    picture[:, :4] = 1
    forms = [left_half(), left_half().long(), picture, picture * 255, picture.numpy(), (picture * 255).numpy(),
             picture.bool(), PIL.Image.fromarray((picture * 255).numpy()).convert("RGBA")]  # fmt: skip
    for form in forms:
        assert torch.equal(read_masks(form), left_half().bool())


def test_images_are_resized_without_aliasing():
    stripes = torch.tensor([0.0, 1.0]).repeat(32).expand(1, 3, 64, 64)
    array = stripes[0].permute(1, 2, 0).numpy()
    for form in (stripes, array, PIL.Image.fromarray((array * 255).astype(np.uint8))):
        assert read_images(form, 3, 8, 8).sub(0.5).abs().max() < 0.1
    assert read_images(PIL.Image.new("RGBA", (16, 16)), 4, 8, 8).shape == (1, 4, 8, 8)


def test_a_resized_image_does_not_depend_on_the_batch():
    hard = (pictures(2, 24, 24) > 0.5).float() * torch.tensor([0.4, 1.0]).view(2, 1, 1, 1)
    assert torch.equal(read_images(hard, 3, 8, 8)[:1], read_images(hard[:1], 3, 8, 8))
    assert torch.equal(read_images(hard, 3, 8, 8), read_images(list(hard), 3, 8, 8))


@pytest.mark.parametrize(("mode", "channels"), [("RGBA", 3), ("LA", 1)])
def test_what_is_transparent_is_white(mode, channels):
    picture = PIL.Image.new("RGBA", (8, 8), (0, 0, 0, 0)).convert(mode)
    assert read_images(picture, channels).eq(1).all()


def test_the_alpha_of_networks_that_have_it_stays():
    assert read_images(PIL.Image.new("LA", (1, 1), (100, 50)), 2).mul(255).flatten().tolist() == pytest.approx(
        [100, 50]
    )


@pytest.mark.parametrize("mode", ["L", "P", "RGB"])
def test_a_mask_in_which_a_colour_stands_for_nothing_is_refused(mode, tmp_path):
    mask = PIL.Image.new("L", (8, 8))
    mask.paste(255, (0, 0, 2, 2))
    mask.convert(mode).save(tmp_path / "mask.png", transparency=0 if mode != "RGB" else (0, 0, 0))
    with PIL.Image.open(tmp_path / "mask.png") as read, pytest.raises(ValueError, match="transparent in part"):
        read_masks(read)


def test_the_factor_leads_to_the_models_size():
    pipe = pipeline(ConsistencySuperResolutionPipeline)
    small = pictures(1, 2, 2)
    assert pipe(small, generator=seeded(), output_type="pt").images.shape == (1, 3, 8, 8)
    assert pipe(small, factor=2, generator=seeded(), output_type="pt").images.shape == (1, 3, 4, 4)


def test_strength_chooses_the_levels():
    pipe = pipeline(ConsistencyImg2ImgPipeline)
    assert pipe.levels_of(0.6, 1) == pytest.approx([5.38], rel=1e-4)  # 16 of Karras' 40, as the paper's strokes
    assert pipe.levels_of(1, 2)[0] == pytest.approx(80)
    assert pipe.levels_of(1, 4) == pytest.approx(pipe.scheduler.levels_for(4).tolist())
    assert len(set(pipe.levels_of(0.6, 24))) == 24
    levels = [pipe.levels_of(strength, 3) for strength in (0.2, 0.5, 0.9)]
    assert all(a > b > c for a, b, c in levels) and levels[0][0] < levels[1][0] < levels[2][0]


def test_img2img_starts_from_the_image_and_as_much_noise_as_it_says():
    pipe, image = pipeline(ConsistencyImg2ImgPipeline), pictures(1)
    states, noise = [], torch.randn(1, 3, 8, 8, generator=seeded())
    pipe.unet.register_forward_pre_hook(lambda _, arguments: states.append(arguments[0]))
    pipe(image, sigmas=[5.38, 2.24], generator=seeded(), output_type="pt")
    torch.testing.assert_close(states[0] * (5.38**2 + 0.25) ** 0.5, 2 * image - 1 + 5.38 * noise, rtol=0, atol=1e-5)
    pipe(image, strength=0.6, num_inference_steps=1, latents=noise)
    torch.testing.assert_close(states[2], states[0], rtol=0, atol=1e-3)


MIXTURE = PointMixture(torch.tensor([[[[0.5, -0.5], [0.2, 0.8]]], [[[-0.7, 0.1], [0.6, -0.3]]]]), 0.1)


class IdealNetwork(torch.nn.Module):
    """An EDM network that says what the best denoiser of a mixture says."""

    dtype, device = torch.float32, torch.device("cpu")

    def forward(self, sample: Tensor, timestep: Tensor, return_dict: bool = True) -> tuple[Tensor]:
        sigma = (4 * timestep.double()).exp()[:, None, None, None]
        x = sample.double() * (sigma**2 + 0.25) ** 0.5
        denoised = MIXTURE.denoise(x, sigma.flatten())
        return ((denoised - x * 0.25 / (sigma**2 + 0.25)) * 2 * (sigma**2 + 0.25) ** 0.5 / sigma,)


def test_denoising_is_the_consistency_function_at_the_images_level():
    pipe, noisy = pipeline(ConsistencyDenoisePipeline), pictures(2) + 0.1 * torch.randn(2, 3, 8, 8, generator=seeded())
    result = pipe(noisy, noise_level=0.1, output_type="latent").images
    f = Denoiser(pipe.unet, pipe.scheduler.boundary)
    torch.testing.assert_close(result, f(2 * noisy - 1, 0.2).clamp(-1, 1), rtol=0, atol=1e-5)
    levels = pipe.levels_below(0.2, 3)
    assert levels[0] == 0.2 and levels[0] > levels[1] > levels[2] > 0.002
    assert pipe(noisy, noise_level=0.1, num_inference_steps=3, output_type="pt").images.shape == noisy.shape


@pytest.mark.parametrize("sigma", [0.02, 0.1, 0.5])
def test_the_noise_level_is_found(sigma):
    smooth = torch.linspace(0, 1, 32).view(1, 1, 1, 32) * torch.linspace(0, 1, 31).view(1, 1, 31, 1)
    noisy = smooth + sigma * torch.randn(8, 3, 31, 32, generator=seeded())
    assert estimate_noise_level(noisy) == pytest.approx(sigma, rel=0.05)
    assert estimate_noise_level(smooth) < 0.01


@pytest.mark.parametrize("steps", [1, 4])
def test_an_estimated_level_stays_within_the_students(steps):
    pipe = pipeline(ConsistencyDenoisePipeline)
    flat = torch.full((1, 3, 8, 8), 0.25)
    result = pipe(flat, num_inference_steps=steps, output_type="pt").images
    torch.testing.assert_close(result, flat, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_walk_is_the_same_after_an_edit_that_shares_the_scheduler(dtype):
    walks = pipeline(ConsistencyInterpolationPipeline).to(dtype=dtype)
    walk = lambda: walks(num_frames=3, generator=seeded(), output_type="latent").images  # noqa: E731
    before = walk()
    ConsistencyImg2ImgPipeline.from_pipe(walks)(pictures(1), 0.37, num_inference_steps=1)
    assert torch.equal(walk(), before)


@pytest.mark.parametrize("name", ["inpaint", "img2img"])
def test_edits_from_large_noise_are_finite_in_half_precision(name):
    """Of a student that is trained on all of a cosine schedule, up to sigma = 20,000."""
    scheduler = ConsistencyScheduler.from_teacher(
        DDPMScheduler(beta_schedule="squaredcos_cap_v2"), boundary="lcm", original_inference_steps=50
    )
    kind = ConsistencyInpaintPipeline if name == "inpaint" else ConsistencyImg2ImgPipeline
    pipe = pipeline(kind, scheduler)
    arguments = (pictures(1), left_half()) if name == "inpaint" else (pictures(1), 1.0)
    whole = pipe(*arguments, generator=seeded(), output_type="pt").images
    half = pipe.to(dtype=torch.float16)(*arguments, generator=seeded(), output_type="pt").images
    torch.testing.assert_close(half.float(), whole, rtol=0, atol=0.05)
    noise, times = torch.randn(8, 3, 8, 8, generator=seeded()).half() * 4, torch.full((8,), 999)
    assert scheduler.add_noise(torch.zeros_like(noise), noise, times).isfinite().all()


def test_walks_begin_and_end_at_the_samples_of_their_ends():
    pipe, ends = pipeline(ConsistencyInterpolationPipeline), torch.randn(2, 3, 8, 8, generator=seeded())
    frames = pipe(num_frames=5, latents=ends, output_type="pt").images
    plain = quiet(ConsistencyPipeline.from_pipe(pipe))
    torch.testing.assert_close(frames[[0, -1]], plain(2, latents=ends, output_type="pt").images, rtol=0, atol=1e-5)
    assert len({frame.sum().item() for frame in frames}) == 5
    again = [pipe(num_frames=5, generator=seeded(3), num_inference_steps=2, output_type="pt").images for _ in "ab"]
    assert torch.equal(*again)


def test_frames_share_the_noise_of_later_steps():
    pipe, end = pipeline(ConsistencyInterpolationPipeline), torch.randn(1, 3, 8, 8, generator=seeded())
    frames = pipe(num_frames=3, latents=end.repeat(2, 1, 1, 1), num_inference_steps=3, output_type="pt").images
    torch.testing.assert_close(frames[1:], frames[:1].expand(2, -1, -1, -1), rtol=0, atol=1e-5)


def test_spherical_interpolation_keeps_lengths():
    a, b = torch.randn(2, 1, 3, 8, 8, generator=seeded())
    b = b * a.norm() / b.norm()
    way = slerp(a, b, torch.linspace(0, 1, 9))
    torch.testing.assert_close(way.flatten(1).norm(dim=1), a.norm().expand(9))
    steps = (way[1:] - way[:-1]).flatten(1).norm(dim=1)
    torch.testing.assert_close(steps, steps[:1].expand(8), rtol=1e-4, atol=0)
    torch.testing.assert_close(slerp(a, a, torch.linspace(0, 1, 3)), a.expand(3, -1, -1, -1))


def test_an_inverted_image_is_what_the_ode_leads_back_to():
    scheduler, network = diffusers.EDMEulerScheduler(), IdealNetwork()
    student = ConsistencyScheduler.from_teacher(scheduler, sigma_min=0.02, sigma_max=20.0)
    pipe = pipeline(ConsistencyInterpolationPipeline, student, in_channels=1, out_channels=1, sample_size=2)
    image = (MIXTURE.draw(2).float() / 2 + 0.5).clamp(0, 1)
    noise = pipe.invert(2 * image - 1, (network, scheduler), num_steps=60)
    assert 0.2 < noise.std() < 3
    denoise = Denoiser(network, read_preconditioning(scheduler))
    back = follow(denoise, noise * 20.0, karras_grid(61, 0.02, 20.0).flip(0))
    torch.testing.assert_close(back, 2 * image - 1, rtol=0, atol=5e-3)


def test_dropout_does_not_invert():
    pipe, unet = pipeline(ConsistencyInterpolationPipeline), build_unet(dropout=0.5).train()
    images = 2 * pictures(2) - 1
    noises = [pipe.invert(images, (unet, diffusers.EDMEulerScheduler()), num_steps=2) for _ in "ab"]
    assert torch.equal(*noises) and unet.training


def test_a_walk_between_images_needs_a_teacher():
    pipe, teacher = pipeline(ConsistencyInterpolationPipeline), (build_unet(), diffusers.EDMEulerScheduler())
    frames = pipe(pictures(2), teacher, num_frames=4, num_inversion_steps=3, output_type="pt").images
    assert frames.shape == (4, 3, 8, 8)


# Measurements of users ----------------------------------------------------------------------------------------------


class Fourier:
    """Coefficients of the discrete Fourier transform, orthonormal."""

    def coefficients(self, images: Tensor) -> Tensor:
        return torch.fft.fft2(images, norm="ortho")

    def images(self, coefficients: Tensor) -> Tensor:
        return torch.fft.ifft2(coefficients, norm="ortho").real


def test_a_known_blur_is_undone_where_it_lets_anything_through():
    kernel = torch.tensor([[0.5, 0.25], [0.25, 0.0]])
    image, basis = pictures(2) * 2 - 1, Fourier()
    response = torch.fft.fft2(kernel, s=(8, 8))
    blurred = torch.fft.ifft2(torch.fft.fft2(image) * response).real
    passed = response.abs() > 0.1
    assert 0 < (~passed).sum() < passed.sum()
    known = Known(basis.coefficients(blurred) / torch.where(passed, response, 1), passed, basis)
    pipe = pipeline(ConsistencyRestorationPipeline)
    result = pipe(known, generator=seeded(), output_type="latent").images
    again = torch.fft.ifft2(torch.fft.fft2(result) * response * passed).real
    torch.testing.assert_close(
        again, torch.fft.ifft2(torch.fft.fft2(image) * response * passed).real, atol=1e-5, rtol=0
    )
    assert pipe(known, generator=seeded()).images[0].size == (8, 8)


# Bad input ----------------------------------------------------------------------------------------------------------


def walk(image, teacher):
    return pipeline(ConsistencyInterpolationPipeline)(image, teacher)


GREY = Known(pictures(channels=1), torch.tensor(True))


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (lambda: pipeline(ConsistencyColorizePipeline, in_channels=1, out_channels=1)(pictures(1)), "of 3 channels"),
        (lambda: pipeline(ConsistencyColorizePipeline)(pictures(1, channels=2)), "3 channels"),
        (lambda: pipeline(ConsistencyColorizePipeline)(pictures(2), batch_size=3), "Got 2 for `image`"),
        (lambda: pipeline(ConsistencySuperResolutionPipeline)(pictures(1, 3, 3)), "No whole factor"),
        (lambda: pipeline(ConsistencySuperResolutionPipeline)(pictures(1, 2, 4)), "No whole factor"),
        (lambda: pipeline(ConsistencySuperResolutionPipeline)(pictures(1, 4, 4), factor=1), "at least 2"),
        (lambda: pipeline(ConsistencySuperResolutionPipeline)(pictures(1, 4, 4), factor=1.5), "at least 2"),
        (lambda: pipeline(ConsistencyImg2ImgPipeline)(pictures(1), strength=0.0), "`strength` must lie above 0"),
        (lambda: pipeline(ConsistencyImg2ImgPipeline)(pictures(1), strength=1.1), "`strength` must lie above 0"),
        (lambda: pipeline(ConsistencyImg2ImgPipeline)(pictures(1), strength=0.1, num_inference_steps=9), "leaves 5"),
        (lambda: pipeline(ConsistencyImg2ImgPipeline)(pictures(1), num_inference_steps=0), "num_inference_steps"),
        (lambda: pipeline(ConsistencyImg2ImgPipeline)(pictures(1), strength=0.5, sigmas=[1.0]), "not both"),
        (lambda: pipeline(ConsistencyDenoisePipeline)(pictures(1), noise_level=50.0), "`noise_level` must lie"),
        (lambda: pipeline(ConsistencyDenoisePipeline)(pictures(1), noise_level=0.1, sigmas=[1.0]), "not both"),
        (lambda: pipeline(ConsistencyDenoisePipeline)(pictures(1), timesteps=[3]), "cannot be chosen"),
        (lambda: pipeline(ConsistencyDenoisePipeline)(pictures(1), 0.1, num_inference_steps=39), "exceeds"),
        (lambda: pipeline(ConsistencyDenoisePipeline)(pictures(1), 25), r"in \[0.001, 1\]"),
        (lambda: pipeline(ConsistencyDenoisePipeline)(pictures(1), sigmas=[]), "descending order"),
        (lambda: pipeline(ConsistencyDenoisePipeline)(pictures(1), height=8), "no argument 'height'"),
        (lambda: pipeline(ConsistencySuperResolutionPipeline)(pictures(1, 4, 4), width=8), "no argument 'width'"),
        (lambda: pipeline(ConsistencySuperResolutionPipeline)([*pictures(1, 4, 4), *pictures(1, 2, 2)]), "several"),
        (lambda: pipeline(ConsistencyImg2ImgPipeline)(pictures(1), "0.5"), "`strength` must lie"),
        (lambda: pipeline(ConsistencyImg2ImgPipeline)([]), "empty list"),
        (lambda: pipeline(ConsistencyImg2ImgPipeline)("room.png"), "unknown format: str"),
        (lambda: pipeline(ConsistencyImg2ImgPipeline)(pictures(1).int()), "floating point numbers or bytes"),
        (lambda: pipeline(ConsistencyImg2ImgPipeline)(PIL.Image.new("I;16", (8, 8))), "mode 'I;16'"),
        (lambda: pipeline(ConsistencyInpaintPipeline)(pictures(1), PIL.Image.new("RGBA", (8, 8))), "transparent"),
        (lambda: pipeline(ConsistencyImg2ImgPipeline, sample_size=None)(pictures(1), height=4), "both `height`"),
        (lambda: pipeline(ConsistencyInpaintPipeline)(pictures(2), [left_half()[0], left_half(4, 8)[0]]), "one size"),
        (lambda: walk(pictures(3), (build_unet(), diffusers.EDMEulerScheduler())), "two ends, got 3"),
        (lambda: walk(pictures(2), "teacher"), "must be a pipeline"),
        (lambda: walk(pictures(2), (build_unet(), ConsistencyScheduler())), "consistency model has no"),
        (lambda: walk(pictures(2), (build_unet(), diffusers.EDMEulerScheduler(sigma_max=9.0))), "its teacher knows 9"),
        (lambda: walk(pictures(2), (build_unet().to("meta"), diffusers.EDMEulerScheduler())), "on meta"),
        (lambda: pipeline(ConsistencyInterpolationPipeline)(num_frames=1), "at least 2"),
        (lambda: pipeline(ConsistencyInterpolationPipeline)(pictures(2)), "go together"),
        (lambda: pipeline(ConsistencyInterpolationPipeline)(latents=torch.randn(3, 3, 8, 8)), "two ends"),
        (lambda: pipeline(ConsistencyInterpolationPipeline)(generator=[seeded()]), "one `generator`"),
        (lambda: pipeline(ConsistencyRestorationPipeline)(GREY), "images of 3 channels"),
        (lambda: pipeline(ConsistencyInpaintPipeline)(pictures(1), left_half(), no_option=1), "no_option"),
    ],
)  # fmt: skip
def test_bad_input_is_named(run, message):
    with pytest.raises((ValueError, TypeError), match=message):
        run()
