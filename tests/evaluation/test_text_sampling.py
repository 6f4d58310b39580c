"""Images that students and teachers make of text, each from its seed and its prompt alone."""

import diffusers
import pytest
import torch
from stable_diffusion import make_sdxl, make_stable_diffusion
from text_students import make_text_student, save_text_student

from cm_diffusers import load_pipeline
from cm_diffusers.evaluation import teacher_sampler, text_student_sampler, text_teacher_sampler
from cm_diffusers.evaluation.digests import student_digest
from cm_diffusers.evaluation.sampling import eight_bits
from cm_diffusers.hub.student import Student
from cm_diffusers.training.randomness import generators
from cm_diffusers.training.teacher import load_teacher

PROMPTS = ["a cat", "the dog, left", "x"]


def ancestral():
    pipe = make_stable_diffusion()
    pipe.scheduler = diffusers.EulerAncestralDiscreteScheduler.from_config(pipe.scheduler.config)
    return pipe


SAMPLERS = {
    "student that is told": lambda: text_student_sampler(make_text_student(), 2, PROMPTS),
    "adapters": lambda: text_student_sampler(make_text_student("adapters", xl=True), 2, PROMPTS),
    "guided student": lambda: text_student_sampler(make_text_student("untold"), 2, PROMPTS, 3.0),
    "teacher": lambda: text_teacher_sampler(make_stable_diffusion(), 3, PROMPTS),
    "SDXL teacher": lambda: text_teacher_sampler(make_sdxl(), 3, PROMPTS),
    "stochastic teacher": lambda: text_teacher_sampler(ancestral(), 3, PROMPTS),
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_an_image_depends_on_its_seed_and_its_prompt_alone(name):
    sampler = SAMPLERS[name]()
    together = sampler.draw(range(5))
    assert together.dtype == torch.uint8 and together.shape == (5, 3, 16, 16)
    apart = torch.cat([sampler.draw([seed]) for seed in (4, 1)])
    assert (together[[4, 1]].int() - apart.int()).abs().max() <= 1  # rounding
    assert sampler.prompts == tuple(PROMPTS)


def test_prompts_take_turns():
    pipe = make_text_student()
    own = pipe(
        [PROMPTS[2], PROMPTS[0]], num_inference_steps=1, guidance_scale=8.5, generator=generators([2, 3]),
        output_type="pt",
    ).images  # fmt: skip
    found = text_student_sampler(pipe, 1, PROMPTS).draw([2, 3])
    torch.testing.assert_close(found, eight_bits(own, (0, 1)), rtol=0, atol=1)


HEUN, PNDM = diffusers.HeunDiscreteScheduler, diffusers.PNDMScheduler


@pytest.mark.parametrize(
    ("kind", "guidance", "nfe", "description"),
    [
        ("full", None, 2, "multistep consistency, guidance 8.5"),
        ("full", 3.0, 2, "multistep consistency, guidance 3"),
        ("untold", None, 2, "multistep consistency"),
        ("untold", 2.0, 4, "multistep consistency, guidance 2"),
    ],
)
def test_a_student_counts_double_only_where_it_is_asked_twice(kind, guidance, nfe, description):
    pipe = make_text_student(kind)
    seen = []
    pipe.unet.register_forward_pre_hook(lambda module, arguments: seen.append(len(arguments[0])))
    sampler = text_student_sampler(pipe, 2, PROMPTS, guidance)
    sampler.draw([0, 1, 2])
    assert sum(seen) == 3 * sampler.nfe == 3 * nfe
    assert sampler.description == description


@pytest.mark.parametrize(
    ("scheduler", "guidance", "description"),
    [(None, 7.5, "DDIM, guidance 7.5"), (None, 1.0, "DDIM"), (HEUN, 7.5, None), (PNDM, 1.0, None)],
)
def test_a_teachers_evaluations_are_counted(scheduler, guidance, description):
    pipe = make_stable_diffusion()
    if scheduler is not None:
        pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    seen = []
    pipe.unet.register_forward_pre_hook(lambda module, arguments: seen.append(len(arguments[0])))
    sampler = text_teacher_sampler(pipe, 5, PROMPTS, guidance)
    sampler.draw([0, 1])
    assert sum(seen) == 2 * sampler.nfe
    assert description in (None, sampler.description)


def test_the_digest_of_adapters_is_that_of_their_file(tmp_path):
    trained = make_text_student("adapters")
    folder = save_text_student(tmp_path, "adapters")
    loaded = load_pipeline(folder, base=make_stable_diffusion())
    digests = {text_student_sampler(pipe, 1, PROMPTS).digest for pipe in (trained, loaded)}
    student = Student(folder, "me/lora")
    assert digests == {student_digest(student._weights(), student.scheduler.config)}
    next(w for name, w in loaded.unet.named_parameters() if ".lora_B." in name).data += 1
    assert text_student_sampler(loaded, 1, PROMPTS).digest not in digests


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((1, "a cat"), TypeError, "must be a list of texts, got 'a cat'"),
        ((1, [3]), TypeError, "must be a list of texts"),
        ((1, []), ValueError, "one text at least"),
        ((1, PROMPTS, 0.5), ValueError, "`guidance_scale` must be at least 1"),
        ((60, PROMPTS), ValueError, "exceeds the"),
    ],
)
def test_what_cannot_be_drawn_is_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        text_student_sampler(make_text_student(), *arguments)


def test_a_teacher_of_text_is_not_drawn_without_prompts():
    with pytest.raises(ValueError, match="makes images of text"):
        teacher_sampler(load_teacher(make_stable_diffusion()), 3)
