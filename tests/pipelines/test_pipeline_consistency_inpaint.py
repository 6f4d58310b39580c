from __future__ import annotations

from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import CMStochasticIterativeScheduler, ConsistencyModelPipeline, DDPMScheduler, UNet2DModel
from torch import Tensor

from cm_diffusers import ConsistencyInpaintPipeline, ConsistencyPipeline, ConsistencyScheduler


def pipeline(unet: UNet2DModel, scheduler: Any = None) -> ConsistencyInpaintPipeline:
    pipe = ConsistencyInpaintPipeline(unet, ConsistencyScheduler() if scheduler is None else scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def picture(count: int = 1, channels: int = 3) -> Tensor:
    return torch.rand(count, channels, 8, 8, generator=torch.Generator().manual_seed(5))


def half() -> Tensor:
    """White, to be repainted, on the right."""
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., 4:] = 1
    return mask


def repaint(pipe: ConsistencyInpaintPipeline, image: Any, mask: Any, **options: Any) -> Tensor:
    options = {"output_type": "pt", "generator": torch.Generator().manual_seed(0), **options}
    return pipe(image, mask, **options).images


@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("stock", [True, False])
def test_black_is_kept_and_white_is_repainted(unet, steps, stock):
    scheduler = None if stock else ConsistencyScheduler.from_teacher(DDPMScheduler(), num_levels=18)
    image = picture()
    result = repaint(pipeline(unet, scheduler), image, half(), num_inference_steps=steps)
    torch.testing.assert_close(result[..., :4], image[..., :4], rtol=0, atol=1e-6)
    assert (result[..., 4:] - image[..., 4:]).abs().mean() > 0.05


def test_nothing_known_is_sampling_and_all_known_is_the_image(unet):
    pipe, image, white = pipeline(unet), picture(), torch.ones(1, 1, 8, 8)
    drawn = ConsistencyPipeline(unet, ConsistencyScheduler())(
        num_inference_steps=4, generator=torch.Generator().manual_seed(0), output_type="pt"
    ).images
    assert torch.equal(repaint(pipe, image, white, num_inference_steps=4), drawn)
    torch.testing.assert_close(repaint(pipe, image, white * 0), image, rtol=0, atol=1e-6)


def test_every_state_holds_the_known_part_at_its_noise_level(unet):
    """The first state is the known part plus noise, never noise alone; later ones have noise up to their level."""
    pipe, image, states = pipeline(unet), picture().repeat(64, 1, 1, 1), []
    pipe.unet.register_forward_pre_hook(lambda _, arguments: states.append(arguments[0]))
    sigmas = [3.0, 1.0, 0.5]
    repaint(pipe, image, half(), sigmas=sigmas)
    for sigma, state in zip(sigmas, states, strict=True):
        noise = state * (sigma**2 + 0.25) ** 0.5 - (2 * image - 1)
        assert noise[..., :4].mean().abs() < 0.05 * sigma
        assert abs(noise[..., :4].std() / sigma - 1) < 0.03
    unknown = states[0][..., 4:] * (3**2 + 0.25) ** 0.5
    assert abs(unknown.std() / 3 - 1) < 0.03, "it starts from noise, without the image under the mask"


def test_what_lies_under_the_mask_does_not_matter(unet):
    pipe, image = pipeline(unet), picture()
    other = torch.where(half().bool(), 1 - image, image)
    assert torch.equal(repaint(pipe, image, half()), repaint(pipe, other, half()))


def test_thin_strokes_of_a_larger_mask_are_repainted_whole(unet):
    """Where even one masked pixel lies in a pixel of the model."""
    pipe, mask = pipeline(unet), torch.zeros(1, 1, 64, 64)
    mask[..., 21:22, :] = 1
    image = torch.full((1, 3, 64, 64), 0.5).where(mask == 0, 0.0)
    result = repaint(pipe, image, mask)
    assert (result[..., 2, :] - 0.5).abs().mean() > 0.05
    kept = result[..., [0, 1, 3, 4, 5, 6, 7], :]
    torch.testing.assert_close(kept, torch.full_like(kept, 0.5), rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", [(9, 9), (12, 20), (64, 64), (5, 7)], ids=str)
def test_nothing_of_what_is_masked_is_in_what_is_kept(unet, size):
    pipe, mask = pipeline(unet), torch.zeros(1, 1, *size)
    mask[..., size[0] // 3 : size[0] // 2, size[1] // 3 : size[1] // 2] = 1
    image = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(1))
    other = image.where(mask == 0, 1 - image)
    assert torch.equal(repaint(pipe, image, mask), repaint(pipe, other, mask))


@pytest.mark.parametrize("size", [8, 16])
def test_images_and_masks_of_other_numbers_are_refused_at_any_size(unet, size):
    images, masks = torch.rand(2, 3, size, size), torch.ones(4, 1, size, size)
    with pytest.raises(ValueError, match="Got 2 for `image`, need one or 4"):
        repaint(pipeline(unet), images, masks, batch_size=4)
    result = repaint(pipeline(unet), images[:1], masks, batch_size=4, generator=None)
    assert len(result) == 4


@pytest.mark.parametrize("form", ["pil", "numpy", "tensor", "list", "bool", "bool array"])
def test_images_and_masks_come_in_every_form(unet, form):
    eight_bits = (picture() * 255).round() / 255
    array, mask = eight_bits[0].permute(1, 2, 0).numpy(), half()[0, 0].numpy()
    pil = PIL.Image.fromarray((array * 255).round().astype(np.uint8))
    pil_mask = PIL.Image.fromarray((mask * 255).astype(np.uint8))
    forms = {
        "pil": (pil, pil_mask.convert("RGB")), "numpy": (array, mask), "tensor": (eight_bits[0], half()[0]),
        "list": ([pil], [pil_mask]), "bool": (eight_bits[0], half()[0].bool()),
        "bool array": (array, mask.astype(bool)),
    }  # fmt: skip
    pipe = pipeline(unet)
    expected = repaint(pipe, eight_bits, half(), num_inference_steps=2)
    torch.testing.assert_close(repaint(pipe, *forms[form], num_inference_steps=2), expected, rtol=0, atol=1e-6)


def test_batches_masks_and_seeds(unet):
    pipe, images = pipeline(unet), picture(3)
    masks = torch.stack([half()[0], 1 - half()[0], torch.zeros(1, 8, 8)])
    seeds = lambda: [torch.Generator().manual_seed(i) for i in range(3)]  # noqa: E731
    together = repaint(pipe, images, masks, generator=seeds())
    for index, seed in enumerate(seeds()):
        alone = repaint(pipe, images[index : index + 1], masks[index : index + 1], generator=[seed])
        torch.testing.assert_close(together[index : index + 1], alone, rtol=0, atol=1e-5)
    several = repaint(pipe, images[:1], half(), batch_size=3, generator=seeds())
    assert torch.equal(several[..., :4], several[:1, ..., :4].expand(3, -1, -1, -1))
    assert not torch.equal(several[0], several[1])


def test_pictures_of_other_sizes_and_modes_are_fitted(unet):
    pil = PIL.Image.fromarray((picture(1, 1)[0, 0].numpy() * 255).astype(np.uint8)).resize((32, 32))
    mask = PIL.Image.new("L", (32, 32))
    result = pipeline(unet)(pil, mask, num_inference_steps=1).images[0]
    assert result.size == (8, 8) and result.mode == "RGB"


@pytest.mark.parametrize(
    "image, mask, options, message",
    [
        (picture(), half(), {"batch_size": 0}, "batch_size"),
        (picture(), half(), {"batch_size": -1}, "batch_size"),
        (picture(), half(), {"batch_size": 2.0}, "batch_size"),
        (picture(), half().repeat(1, 2, 1, 1), {}, "one channel"),
        (picture(2), half(), {"batch_size": 3}, "Got 2 for `image`"),
        (picture(3), half().repeat(2, 1, 1, 1), {}, "Got 2 for `mask_image`"),
        (picture() * 2 - 1, half(), {}, r"`image` must have values in \[0, 1\]"),
        (picture(), half() * 255, {}, r"`mask_image` must have values in \[0, 1\], got \[0, 255\]"),
        (picture(), half()[..., :6], {}, "one size, got 8 x 8 and 8 x 6"),
        (PIL.Image.new("RGB", (9, 8)), PIL.Image.new("L", (8, 9)), {}, "one size, got 8 x 9 and 9 x 8"),
        (picture() * float("nan"), half(), {}, "got .nan, nan"),
        (picture(1, 1), half(), {}, "3 channels"),
        ("room.png", half(), {}, "format"),
    ],
)
def test_what_cannot_be_edited_is_refused(unet, image, mask, options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        repaint(pipeline(unet), image, mask, **options)


def test_timesteps_start_where_they_say(unet):
    pipe, states = pipeline(unet), []
    pipe.unet.register_forward_pre_hook(lambda _, arguments: states.append(arguments[0]))
    repaint(pipe, picture().repeat(64, 1, 1, 1), half(), timesteps=[20, 10])
    assert abs(states[0].std() - 1) < 0.05, "noise of the first level, scaled to unit variance"


def test_from_pipe_keeps_the_precision(unet):
    half_precision = ConsistencyPipeline(unet.half(), ConsistencyScheduler())
    assert ConsistencyInpaintPipeline.from_pipe(half_precision).unet.dtype == torch.float16
    assert half_precision.unet.dtype == torch.float16


@pytest.mark.parametrize("stock", [True, False])
def test_from_pipe_shares_the_weights_of_any_consistency_pipeline(unet, stock, tmp_path):
    kind, scheduler = (
        (ConsistencyModelPipeline, CMStochasticIterativeScheduler()) if stock
        else (ConsistencyPipeline, ConsistencyScheduler.from_teacher(DDPMScheduler()))
    )  # fmt: skip
    pipe = ConsistencyInpaintPipeline.from_pipe(kind(unet, scheduler))
    assert pipe.unet is unet
    pipe.set_progress_bar_config(disable=True)
    image = picture()
    result = repaint(pipe, image, half(), num_inference_steps=2)
    pipe.save_pretrained(tmp_path)
    loaded = ConsistencyInpaintPipeline.from_pretrained(tmp_path)
    torch.testing.assert_close(repaint(loaded, image, half(), num_inference_steps=2), result, rtol=0, atol=1e-5)
    assert type(ConsistencyPipeline.from_pretrained(tmp_path)) is ConsistencyPipeline
    if stock:
        ConsistencyModelPipeline.from_pretrained(tmp_path)
