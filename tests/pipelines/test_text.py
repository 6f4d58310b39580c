"""Images of text, as stock pipelines make them."""

import diffusers
import pytest
import torch
from stable_diffusion import make_sdxl, make_stable_diffusion
from text_students import make_text_student

from cm_diffusers.pipelines.text import draw_prompts, prompts_in_turn, resolve_guidance, takes_prompts
from cm_diffusers.training.randomness import generators

PROMPTS = ["a cat", "the dog, left"]
MAKERS = {"sd": make_stable_diffusion, "sdxl": make_sdxl}


@pytest.mark.parametrize("xl", [False, True])
@pytest.mark.parametrize(("kind", "guidance"), [("full", 8.5), ("full", 1.0), ("adapters", 1.0), ("untold", 3.0)])
def test_they_are_the_pipelines_own(xl, kind, guidance):
    pipe = make_text_student(kind, xl)
    found = draw_prompts(pipe, PROMPTS, 2, guidance, generators([3, 4]))
    options = {"num_inference_steps": 2, "guidance_scale": guidance, "generator": generators([3, 4])}
    torch.testing.assert_close(found, pipe(PROMPTS, output_type="pt", **options).images, rtol=1e-4, atol=1e-4)
    assert pipe.text_encoder is not None


@pytest.mark.parametrize("maker", MAKERS)
def test_a_teachers_are_its_own(maker):
    pipe = MAKERS[maker]()
    found = draw_prompts(pipe, PROMPTS, 3, 7.5, generators([0, 1]))
    own = pipe(PROMPTS, num_inference_steps=3, guidance_scale=7.5, generator=generators([0, 1]), output_type="pt")
    torch.testing.assert_close(found, own.images, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("xl", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_parts_may_differ_in_precision(xl, dtype):
    pipe = make_text_student("full", xl)
    expected = draw_prompts(pipe, PROMPTS, 2, 8.5, generators([3, 4]))
    for name in ("text_encoder", "text_encoder_2", "vae"):
        if hasattr(pipe, name):
            getattr(pipe, name).to(dtype)
    found = draw_prompts(pipe, PROMPTS, 2, 8.5, generators([3, 4]))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0, atol=0.05)


def test_a_safety_checker_is_not_asked():
    pipe = make_text_student()
    pipe.safety_checker = pytest.fail
    assert draw_prompts(pipe, PROMPTS, 1, 8.5, generators([0, 1])).std() > 0


@pytest.mark.parametrize("xl", [False, True])
def test_what_is_not_asked_may_be_on_another_device(xl):
    pipe = make_text_student("full", xl)
    expected = draw_prompts(pipe, PROMPTS, 1, 8.5, generators([0, 1]))
    pipe.image_encoder = torch.nn.Linear(1, 1, device="meta")
    if not xl:
        pipe.safety_checker = pipe.image_encoder
    assert torch.equal(draw_prompts(pipe, PROMPTS, 1, 8.5, generators([0, 1])), expected)


def test_latents_with_a_mean_are_decoded_around_it():
    pipe = make_sdxl()
    pipe.vae.register_to_config(latents_mean=[0.1, 0.2, 0.3, 0.4], latents_std=[1.0, 1.1, 1.2, 1.3])
    found = draw_prompts(pipe, PROMPTS, 2, 1.0, generators([0, 1]))
    own = pipe(PROMPTS, num_inference_steps=2, guidance_scale=1.0, generator=generators([0, 1]), output_type="pt")
    torch.testing.assert_close(found, own.images, rtol=1e-4, atol=1e-4)


def test_the_default_guidance_is_what_the_network_knows():
    told, untold = make_text_student(), make_text_student("untold")
    assert (resolve_guidance(told, None), resolve_guidance(untold, None), resolve_guidance(untold, 2)) == (8.5, 1, 2)
    for pipe in (told, untold):
        with pytest.raises(ValueError, match="`guidance_scale` must be at least 1 .* got 0.5"):
            resolve_guidance(pipe, 0.5)


def test_prompts_take_turns():
    assert prompts_in_turn(PROMPTS, [0, 1, 2, 5]) == ["a cat", "the dog, left", "a cat", "the dog, left"]


def test_only_some_pipelines_take_prompts(unet):
    assert takes_prompts(make_text_student("untold"))
    assert not takes_prompts(diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler()))
