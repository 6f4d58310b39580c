import diffusers
import pytest
import torch
from conftest import build_unet

from cm_diffusers import ConsistencyPipeline, ConsistencyScheduler
from cm_diffusers.evaluation import student_sampler, teacher_sampler
from cm_diffusers.evaluation.digests import weights_digest
from cm_diffusers.evaluation.sampling import eight_bits
from cm_diffusers.network_config import class_labels
from cm_diffusers.noise_levels import karras_grid
from cm_diffusers.solvers import integrate
from cm_diffusers.training.randomness import labels_in_turn
from cm_diffusers.training.teacher import Teacher


def student(**config):
    scheduler = ConsistencyScheduler.from_teacher(diffusers.DDPMScheduler(prediction_type="v_prediction"))
    pipeline = ConsistencyPipeline(build_unet(**config), scheduler, config.get("num_class_embeds") and 4)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def teacher(**config):
    return Teacher(build_unet(**config), diffusers.DDPMScheduler(), "teacher")


def calls_of(unet):
    """Fills with the batch size of every evaluation."""
    seen = []
    unet.register_forward_pre_hook(lambda module, arguments: seen.append(len(arguments[0])))
    return seen


SAMPLERS = {
    "student": lambda: student_sampler(student(), 2),
    "class-conditional student": lambda: student_sampler(student(num_class_embeds=5), 1),
    "teacher": lambda: teacher_sampler(teacher(), 5),
    "class-conditional teacher": lambda: teacher_sampler(teacher(num_class_embeds=5), 3, null_class_label=4),
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_an_image_depends_on_its_seed_alone(name):
    sampler = SAMPLERS[name]()
    together = sampler.draw(range(6))
    assert together.dtype == torch.uint8 and together.shape == (6, 3, 8, 8)
    apart = torch.cat([sampler.draw([seed]) for seed in (5, 2)])
    assert (together[[5, 2]].int() - apart.int()).abs().max() <= 1  # rounding
    assert not torch.equal(together[0], together[1])


@pytest.mark.parametrize(("solver", "nfe"), [("heun", 1), ("heun", 7), ("euler", 1), ("euler", 4)])
def test_evaluations_are_counted(solver, nfe):
    model = teacher()
    seen = calls_of(model.unet)
    sampler = teacher_sampler(model, nfe, solver)
    sampler.draw([0, 1])
    assert len(seen) == sampler.nfe == nfe


def test_guidance_counts_double():
    model = student(num_class_embeds=5)
    seen = calls_of(model.unet)
    sampler = student_sampler(model, 2, guidance_scale=2.0)
    sampler.draw([0, 1, 2])
    assert sum(seen) == 3 * sampler.nfe == 12
    guided = teacher_sampler(teacher(num_class_embeds=5), 3, guidance_scale=2.0, null_class_label=4)
    assert (guided.nfe, guided.description) == (6, "Heun, sigma 0.01 to 80, guidance 2")


def test_what_is_drawn_is_described():
    model = student(num_class_embeds=5)
    assert student_sampler(model, 2, class_label=3).description == "multistep consistency, class 3"
    ends = teacher_sampler(teacher(), 3, sigma_min=0.1, sigma_max=10)
    assert ends.description == "Heun, sigma 0.1 to 10"


def test_the_digest_of_halves_is_that_of_the_same_numbers():
    rounded = {"weight": torch.randn(5).half()}
    assert weights_digest(rounded) == weights_digest({"weight": rounded["weight"].float()})
    assert weights_digest(rounded) != weights_digest({"weight": rounded["weight"].bfloat16()})


def test_the_digest_tells_weights_and_schedulers_apart():
    model = student()
    first = student_sampler(model, 1).digest
    assert student_sampler(student(), 2).digest == first
    model.scheduler.register_to_config(sigma_max=40.0)
    assert student_sampler(model, 1).digest != first
    other = student()
    next(other.unet.parameters()).data += 1
    assert student_sampler(other, 1).digest != first


def test_more_steps_than_the_grid_has_are_refused_before_anything_is_drawn():
    with pytest.raises(ValueError, match="exceeds the"):
        student_sampler(student(), 5000)


def test_the_teachers_images_are_the_ends_of_its_ode():
    model, seeds = teacher(), [3, 4]
    noise = torch.stack([torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
    low, high = model.preconditioning.sigma_range
    grid = karras_grid(3, low, 80.0).flip(0)
    with torch.no_grad():
        expected = integrate(model.denoiser, noise * 80.0, grid)
    assert high > 80
    torch.testing.assert_close(teacher_sampler(model, 5).draw(seeds), eight_bits(expected, (-1, 1)), rtol=0, atol=1)


@pytest.mark.parametrize(("arguments", "message"), [((4,), "odd number"), ((0, "euler"), "odd number"),
                                                    ((3, "dpm"), "must be one of euler, heun"),
                                                    ((3, "heun", None, None, 2.0), "`null_class_label`")])  # fmt: skip
def test_what_a_teacher_cannot_do_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        teacher_sampler(teacher(), *arguments)


def test_classes_take_turns_without_the_null_class():
    assert class_labels(build_unet().config) == []
    classes = class_labels(build_unet(num_class_embeds=4).config, 1)
    assert labels_in_turn(classes, range(5)) == [0, 2, 3, 0, 2]
    assert labels_in_turn(classes, range(2), only=3) == [3, 3]
    assert labels_in_turn([], range(3)) is None


def test_eight_bits_round_and_clip():
    values = torch.tensor([-3.0, -1.0, 0.0, 0.0039, 1.0, 2.0])
    assert eight_bits(values, (-1.0, 1.0)).tolist() == [0, 0, 128, 128, 255, 255]
    with pytest.raises(FloatingPointError, match="not finite"):
        eight_bits(torch.tensor([0.0, float("nan")]), (-1.0, 1.0))
