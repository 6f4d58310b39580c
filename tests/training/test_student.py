import diffusers
import pytest
import torch

from cm_diffusers.network_config import read_preconditioning
from cm_diffusers.networks import copy_in, network_output
from cm_diffusers.preconditioning import Denoiser
from cm_diffusers.schedulers import ConsistencyScheduler, ScaledTimeEDMScheduler
from cm_diffusers.training.objectives.tangents import forward_mode
from cm_diffusers.training.student import cut_variance, make_student, needs_conversion, refit_time_embedding
from cm_diffusers.training.teacher import load_teacher


def outputs(unet, scheduler_or_base, sigmas=(0.01, 0.3, 2.0, 60.0)):
    generator = torch.Generator().manual_seed(1)
    base = getattr(scheduler_or_base, "preconditioning", None) or read_preconditioning(scheduler_or_base)
    denoise = Denoiser(unet, base)
    x = torch.randn(2, 3, 8, 8, generator=generator)
    with torch.no_grad():
        return torch.stack([denoise(x * (1 + s), s) for s in sigmas])


def test_teacher_is_left_as_it_is_and_student_learns(unet):
    unet.requires_grad_(False)
    before = {name: value.clone() for name, value in unet.state_dict().items()}
    student, _ = make_student(unet, diffusers.DDPMScheduler(), convert=True)
    assert all(p.requires_grad for p in student.parameters())
    torch.nn.init.zeros_(student.conv_out.weight)
    assert all(torch.equal(value, before[name]) for name, value in unet.state_dict().items())


def test_epsilon_teachers_are_converted_unless_switched_off(unet):
    _, converted = make_student(unet, diffusers.DDPMScheduler(), convert=True)
    _, kept = make_student(unet, diffusers.DDPMScheduler(), convert=False)
    assert converted.config.prediction_type == "v_prediction"
    assert kept.config.prediction_type == "epsilon"


def test_v_prediction_teachers_start_from_what_they_know(unet):
    scheduler = diffusers.DDPMScheduler(prediction_type="v_prediction")
    student, student_scheduler = make_student(unet, scheduler, convert=True)
    torch.testing.assert_close(outputs(student, student_scheduler), outputs(unet, scheduler))


def test_predicted_variance_is_cut_off(make_unet):
    unet = make_unet(out_channels=6)
    scheduler = diffusers.DDPMScheduler(variance_type="learned_range", prediction_type="v_prediction")
    student, student_scheduler = make_student(unet, scheduler, convert=True)
    assert student.config.out_channels == 3
    torch.testing.assert_close(outputs(student, student_scheduler), outputs(unet, scheduler))


def test_cut_variance_leaves_other_networks_alone(unet):
    weight = unet.conv_out.weight
    cut_variance(unet)
    assert unet.conv_out.weight is weight


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("class_name", ["EDMEulerScheduler", "EDMDPMSolverMultistepScheduler"])
def test_edm_student_is_stock_and_starts_from_what_the_teacher_knows(make_unet, prediction_type, class_name):
    unet = make_unet(block_out_channels=(32,), norm_num_groups=8)
    scheduler = getattr(diffusers, class_name)(prediction_type=prediction_type)
    student, student_scheduler = make_student(unet, scheduler, convert=True)
    assert student_scheduler.is_stock
    # D of both, from the same network in the two conventions: the student's f is not D, so compare F.
    base = read_preconditioning(scheduler)
    edm = ConsistencyScheduler(family="edm", prediction_type="epsilon").preconditioning
    sigma = torch.tensor([0.005, 0.1, 1.0, 30.0])
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        old = base.sign * unet(x, base.c_noise(sigma).float()).sample
        new = student(x, student_scheduler.preconditioning.c_noise(sigma).float()).sample
    assert edm.sign == 1
    assert float((new - old).abs().max()) < 0.02 * float(old.std())


def test_edm_student_keeps_the_teachers_time_when_conversion_is_off(make_unet):
    unet = make_unet()
    _, scheduler = make_student(unet, diffusers.EDMEulerScheduler(), convert=False)
    assert scheduler.config.family == "edm"
    assert not scheduler.is_stock


def test_refit_reports_its_error(make_unet):
    unet = make_unet(block_out_channels=(64,), norm_num_groups=8)
    old = read_preconditioning(diffusers.EDMEulerScheduler())
    new = read_preconditioning(diffusers.CMStochasticIterativeScheduler())
    assert refit_time_embedding(unet, old, new) < 1e-2


# A time to differentiate by ---------------------------------------------------------------------------------------


def roughness(unet, family):
    """How much larger dF / d ln(sigma) is than the differences of noise levels a tenth apart."""
    sigma = torch.logspace(-1.5, 1.5, 16, dtype=torch.float64)
    x = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    times = [family.c_noise(sigma * factor).float() for factor in (0.95, 1.0, 1.05)]
    along = (times[2] - times[0]) / 0.1
    tangent = forward_mode(unet, x, times[1], torch.zeros_like(x), along)
    with torch.no_grad():
        difference = (network_output(unet, x, times[2]) - network_output(unet, x, times[0])) / 0.1
    return float(tangent.detach().norm() / difference.norm())


SCHEDULERS = {
    "vp": diffusers.DDPMScheduler(prediction_type="v_prediction"), "flow": diffusers.FlowMatchEulerDiscreteScheduler(),
    "consistency": diffusers.CMStochasticIterativeScheduler(), "scaled edm": ScaledTimeEDMScheduler(),
}  # fmt: skip


@pytest.mark.parametrize("family", SCHEDULERS)
def test_a_smooth_student_can_be_differentiated_by_its_time_and_its_teacher_cannot(make_unet, family):
    unet, scheduler = make_unet(block_out_channels=(64,), norm_num_groups=8), SCHEDULERS[family]
    rough = read_preconditioning(scheduler)
    assert roughness(unet, rough) > 2
    student, student_scheduler = make_student(unet, scheduler, convert=True, smooth=True)
    assert roughness(student, student_scheduler.preconditioning) == pytest.approx(1, rel=0.02)
    assert needs_conversion(scheduler, student_scheduler)
    again = ConsistencyScheduler.from_config(student_scheduler.config).preconditioning
    sigma = torch.tensor([0.02, 1.0, 50.0], dtype=torch.float64)
    torch.testing.assert_close(again.sigma_from_c_noise(again.c_noise(sigma)), sigma)
    _, its_own = make_student(student, student_scheduler, convert=True, smooth=True)
    assert its_own.config.time_scale == student_scheduler.config.time_scale
    assert not needs_conversion(student_scheduler, its_own)


@pytest.mark.parametrize("family", SCHEDULERS)
def test_a_smooth_time_survives_half_precision(make_unet, family):
    unet, scheduler = make_unet(block_out_channels=(64,), norm_num_groups=8), SCHEDULERS[family]
    student, student_scheduler = make_student(unet, scheduler, convert=True, smooth=True)
    times = student_scheduler.preconditioning.c_noise(torch.logspace(-1.5, 1.5, 64, dtype=torch.float64)).float()
    projected = student.time_proj(times)
    with torch.no_grad():
        whole = student.time_embedding(projected)
        half = student.time_embedding.bfloat16()(projected.bfloat16()).float()
    assert float((half - whole).norm() / (whole - whole.mean(0)).norm()) < 0.02


def test_a_time_that_is_smooth_already_is_kept(make_unet):
    unet, scheduler = make_unet(), diffusers.EDMEulerScheduler()
    student, student_scheduler = make_student(unet, scheduler, convert=True, smooth=True)
    assert student_scheduler.config.family == "edm"
    assert not needs_conversion(scheduler, student_scheduler)
    assert torch.equal(outputs(student, student_scheduler), outputs(unet, scheduler))


def test_fixed_frequencies_are_neither_trained_nor_rounded(make_unet):
    teacher = load_teacher((make_unet(time_embedding_type="fourier"), diffusers.ScoreSdeVeScheduler()))
    fixed = teacher.unet.time_proj.weight
    student, _ = make_student(teacher.unet, teacher.scheduler, convert=True)
    assert {n for n, w in student.named_parameters() if not w.requires_grad} == {"time_proj.weight"}
    half = copy_in(teacher.unet, torch.bfloat16)
    assert torch.equal(half.time_proj.weight, fixed) and half.time_proj.weight is not fixed
    sample, time = torch.zeros(1, 3, 8, 8), torch.tensor([50.0])
    torch.testing.assert_close(
        half(sample.bfloat16(), time).sample.float(), teacher.unet(sample, time).sample, atol=0.05, rtol=0
    )


def test_a_time_that_cannot_be_made_smooth_is_told_of(make_unet, caplog):
    unet = make_unet(time_embedding_type="fourier")
    make_student(unet, diffusers.ScoreSdeVeScheduler(), convert=True, smooth=True)
    assert "own embedding of time may be too rough to be differentiated" in caplog.text


@pytest.mark.parametrize("scheduler", [diffusers.DDPMScheduler(), diffusers.EDMEulerScheduler()])
def test_a_rough_time_that_is_kept_is_told_of(make_unet, caplog, scheduler):
    make_student(make_unet(), scheduler, convert=False, smooth=True)
    assert ("too rough" in caplog.text) == isinstance(scheduler, diffusers.DDPMScheduler)


def test_a_smooth_time_is_not_the_discrete_one_of_lcm(unet):
    with pytest.raises(ValueError, match="which those of continuous levels do not have"):
        make_student(unet, diffusers.DDPMScheduler(), convert=True, smooth=True, boundary="lcm")


def test_range_outside_the_teachers_is_refused(unet):
    with pytest.raises(ValueError, match="leaves the teacher's"):
        make_student(unet, diffusers.DDPMScheduler(), convert=True, sigma_max=500.0)
