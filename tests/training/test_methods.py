"""Every method through the trainer: it trains, saves, loads, samples and resumes."""

import shutil

import diffusers
import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import build_unet
from launching import HALVES, SHARDED, WEIGHT_TOLERANCE, WHOLE, final_state, largest_difference, run
from tiny_run import images

from cm_diffusers import (
    ConsistencyConfig,
    ConsistencyInpaintPipeline,
    ConsistencyPipeline,
    ConsistencyScheduler,
    ConsistencyTrainer,
)
from cm_diffusers.preconditioning import Boundary, Denoiser
from cm_diffusers.training.methods import METHODS
from cm_diffusers.training.randomness import SampleRandom

# LPIPS would look for its weights.
SHORT = {"cd": {"distance": "pseudo_huber"}, "ct": {"distance": "pseudo_huber"}}


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """accelerate keeps its precision for the life of a process."""
    AcceleratorState._reset_state(reset_partial_state=True)


def make_trainer(folder, method, teacher=None, **changes):
    config = ConsistencyConfig(**{
        "method": method, "output_dir": str(folder), "max_train_steps": 6, "batch_size": 8, "conversion_steps": 2,
        "teacher_check": False, "tracker": "none", "sample_steps": 0, "checkpoint_steps": 0, "logging_steps": 1,
        **SHORT.get(method, {}), **changes,
    })  # fmt: skip
    teacher = teacher or (build_unet(dropout=0.2), diffusers.DDPMScheduler())
    return ConsistencyTrainer(config, teacher=teacher, train_dataset=images())


def weights(network):
    return torch.cat([weight.detach().flatten() for weight in network.parameters()])


def sample(pipeline, **options):
    options = {"num_inference_steps": None, **options}
    return pipeline(batch_size=2, generator=torch.manual_seed(0), output_type="pt", **options).images


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_saves_loads_and_samples(method, tmp_path):
    trainer = make_trainer(tmp_path, method)
    before = weights(trainer.unet).clone()
    pipeline = trainer.train()
    assert weights(trainer.unet).isfinite().all() and not torch.equal(weights(trainer.unet), before)
    loaded = ConsistencyPipeline.from_pretrained(tmp_path)
    assert loaded.scheduler.config.flow_map == (method == "meanflow")
    for nfe in (1, 2, 4):
        torch.testing.assert_close(sample(loaded, num_inference_steps=nfe), sample(pipeline, num_inference_steps=nfe))


@pytest.mark.parametrize("method", ["tcm", "scd", "meanflow"])
def test_a_run_resumes_to_the_same_bits(method, tmp_path):
    whole = make_trainer(tmp_path, method, checkpoint_steps=2, checkpoint_limit=9)
    whole.train()
    for step in ("00000006", "00000008"):  # tcm is in its second stage at 6
        shutil.rmtree(tmp_path / "checkpoints" / f"step-{step}")
    resumed = make_trainer(tmp_path, method, checkpoint_steps=2, resume="auto")
    resumed.train()
    for name, network in whole.memory.networks.items():
        assert torch.equal(weights(network), weights(resumed.memory.networks[name]))
    for name, companion in whole.companions.items():
        assert torch.equal(weights(companion.module), weights(resumed.companions[name].module))
        assert weights(companion.module).abs().sum() > 0


MEANFLOW = {"method": "meanflow", "num_levels": None, "distance": "l2", "weighting": "adaptive"}
# Forward mode does not see through hooks that gather weights.
SCD = {**MEANFLOW, "method": "scd", "derivative": "finite_difference", "adversarial_weight": 0.1, "real_data": 0.2}


@pytest.mark.parametrize(("method", "split"), [(MEANFLOW, HALVES), (SCD, SHARDED)], ids=["two ranks", "sharded"])
def test_split_runs_equal_one_process(method, split, tmp_path):
    for name, layout in (("one", WHOLE), ("split", split)):
        run(tmp_path / name, **{**layout, **method, "max_train_steps": 4})
    # With what is trained beside the student, and its moments.
    assert largest_difference(final_state(tmp_path / "one"), final_state(tmp_path / "split")) < WEIGHT_TOLERANCE


@pytest.mark.parametrize("family", ["edm", "v", "flow"])
def test_continuous_methods_take_every_family(family, tmp_path):
    schedulers = {
        "edm": diffusers.EDMEulerScheduler(), "v": diffusers.DDPMScheduler(prediction_type="v_prediction"),
        "flow": diffusers.FlowMatchEulerDiscreteScheduler(),
    }  # fmt: skip
    for method in ("scd", "meanflow"):
        AcceleratorState._reset_state(reset_partial_state=True)
        trainer = make_trainer(tmp_path / method, method, (build_unet(), schedulers[family]))
        assert sample(trainer.train(), num_inference_steps=2).isfinite().all()


def test_finite_differences_train_alike(tmp_path):
    moved = []
    for derivative in ("forward", "finite_difference"):
        AcceleratorState._reset_state(reset_partial_state=True)
        teacher = build_unet(), diffusers.DDPMScheduler()  # whose masks of dropout would be others
        trainer = make_trainer(tmp_path / derivative, "scd", teacher, derivative=derivative, tangent_warmup_steps=0)
        before = weights(trainer.unet).clone()
        trainer.train()
        moved.append(weights(trainer.unet) - before)
    assert (moved[0] - moved[1]).norm() < 0.05 * moved[0].norm()


@pytest.mark.parametrize("derivative", ["forward", "finite_difference"])
def test_derivatives_are_taken_in_full_precision(derivative, tmp_path):
    """accelerate's autocast is inside of the network that it prepared."""
    seen = set()
    trainer = make_trainer(tmp_path, "scd", derivative=derivative, mixed_precision="bf16")
    trainer.unet.conv_in.register_forward_hook(lambda layer, inputs, output: seen.add((output.dtype, trainer.inside)))
    objective = trainer.phases[-1].objective.objective
    inner, trainer.inside = objective.derivative, False

    def watched(*arguments, **conditioning):
        trainer.inside = True
        found = inner(*arguments, **conditioning)
        trainer.inside = False
        return found

    object.__setattr__(objective, "derivative", watched)
    trainer.train()
    assert seen == {(torch.float32, True), (torch.bfloat16, False)}


def test_a_truncated_student_is_sampled_where_it_was_trained(tmp_path):
    scheduler = make_trainer(tmp_path, "tcm", truncation=1.5).scheduler
    assert scheduler.grid.min() == pytest.approx(1.5)
    for nfe in (2, 3, 4, 8):
        assert scheduler.levels_for(nfe).min() >= 1.5 * (1 - 1e-6)


# A student with a second time ----------------------------------------------------------------------------------------


def test_a_flow_map_of_the_first_step_is_the_teacher(tmp_path):
    teacher = build_unet(), diffusers.EDMEulerScheduler()
    trainer = make_trainer(tmp_path, "meanflow", teacher)
    x, sigma = torch.randn(2, 3, 8, 8), torch.tensor([0.7, 4.0])
    scalings = trainer.scheduler.preconditioning.scalings(sigma)
    with torch.no_grad():
        expected = teacher[0](x, scalings.c_noise).sample
        for second in (0.0, 3.0):
            told = trainer.unet(x, scalings.c_noise, class_labels=torch.full((2,), second)).sample
            torch.testing.assert_close(told, expected)


def test_a_flow_map_steps_along_the_denoised_image_without_noise():
    scheduler = ConsistencyScheduler(family="edm", boundary="euler", flow_map=True)
    unet, x = build_unet(class_embed_type="timestep"), torch.randn(2, 3, 8, 8)
    scheduler.set_timesteps(sigmas=[80.0, 2.0])
    for index, (sigma, lower) in enumerate([(80.0, 2.0), (2.0, 0.002)]):
        told = scheduler.preconditioning.c_noise(torch.tensor([lower])).float()
        assert scheduler.target_timesteps[index] == pytest.approx(float(told))
        with torch.no_grad():
            boundary = Boundary(scheduler.preconditioning, "euler", lower)
            expected = Denoiser(unet, boundary)(sigma * x, sigma, class_labels=told.expand(2))
            t = scheduler.timesteps[index]
            output = unet(scheduler.scale_model_input(sigma * x, t), t, class_labels=told.expand(2)).sample
        scheduler.register_to_config(clip_denoised=False)
        torch.testing.assert_close(scheduler.step(output, t, sigma * x).prev_sample, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", [{"boundary": "edm", "family": "edm"}, {"boundary": "edm"}])
def test_a_flow_map_is_of_the_euler_form(options):
    with pytest.raises(ValueError, match="needs `boundary='euler'`"):
        ConsistencyScheduler(flow_map=True, **options)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_flow_map_is_sampled_in_half_precision(dtype):
    scheduler = ConsistencyScheduler(family="edm", boundary="euler", flow_map=True)
    pipeline = ConsistencyPipeline(build_unet(class_embed_type="timestep").to(dtype), scheduler)
    assert sample(pipeline, num_inference_steps=2).isfinite().all()


def test_a_flow_map_answers_with_its_clean_image_whatever_the_jump(tmp_path):
    """Where it does not jump, that is D, and not the noisy state that it stays at."""
    trainer = make_trainer(tmp_path, "meanflow", (build_unet(), diffusers.EDMEulerScheduler()))
    objective = trainer.phases[-1].objective
    clean = images()[:8]
    losses = objective.losses(clean, 0, SampleRandom(torch.arange(8), clean.device))
    jump = objective.jumps.draw(again := SampleRandom(torch.arange(8), clean.device))
    x = clean + jump.sigma.view(-1, 1, 1, 1) * again.normal_like(clean)
    denoiser = Denoiser(trainer.unet, trainer.scheduler.preconditioning)
    torch.testing.assert_close(losses.denoised, denoiser(x, jump.sigma, **jump.conditioning), rtol=1e-4, atol=1e-4)


def test_a_flow_map_keeps_what_is_known_on_its_way():
    scheduler = ConsistencyScheduler(family="edm", boundary="euler", flow_map=True)
    pipeline = ConsistencyInpaintPipeline(build_unet(class_embed_type="timestep"), scheduler)
    noise, image = torch.randn(1, 3, 8, 8), torch.rand(1, 3, 8, 8)
    states = []

    def look(pipe, index, t, tensors):
        states.append((tensors["latents"], float(pipe.scheduler.sigmas[index + 1])))

    pipeline(image, torch.zeros(1, 1, 8, 8), num_inference_steps=4, latents=noise, callback_on_step_end=look)
    for (state, sigma), (later, below) in zip(states, states[1:], strict=False):
        # On the straight line from where it was to the known image.
        torch.testing.assert_close(later, (2 * image - 1) + (below / sigma) * (state - (2 * image - 1)))


def test_flow_maps_are_no_teachers(tmp_path):
    scheduler = ConsistencyScheduler(family="edm", boundary="euler", flow_map=True)
    with pytest.raises(ValueError, match="flow map cannot be a teacher"):
        make_trainer(tmp_path, "scd", (build_unet(class_embed_type="timestep"), scheduler))


def test_flow_maps_refuse_class_conditional_networks(tmp_path):
    with pytest.raises(ValueError, match="class-conditional"):
        make_trainer(tmp_path, "meanflow", (build_unet(num_class_embeds=3), diffusers.EDMEulerScheduler()))


def test_a_new_network_can_be_a_flow_map(tmp_path):
    build_unet().save_config(tmp_path / "unet")
    config = ConsistencyConfig(
        method="meanflow", unet_config=str(tmp_path / "unet"), output_dir=str(tmp_path / "out"), max_train_steps=2,
        batch_size=8, tracker="none", sample_steps=0, checkpoint_steps=0,
    )  # fmt: skip
    ConsistencyTrainer(config, train_dataset=images()).train()
    assert sample(ConsistencyPipeline.from_pretrained(tmp_path / "out"), num_inference_steps=2).isfinite().all()


# What does not go together ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "scd", "distance": "l1"}, "`distance` must be l2"),
        ({"method": "scd", "weighting": "inverse_gap"}, "there is no gap"),
        ({"method": "sct", "target": "ema", "mu": 0.9}, "`target` must be the student"),
        ({"method": "scd", "solver": "heun"}, "`solver` needs .*levels that are not continuous"),
        ({"method": "ect", "level_distribution": "uniform"}, "lognormal where there is no grid"),
        ({"method": "ect", "tangent_warmup_steps": 3}, "`tangent_warmup_steps` needs `levels='continuous'`"),
        ({"method": "cd", "stages": 3}, "`stages` needs `levels='mapping'`"),
        ({"method": "cd", "flow_map": True}, "`flow_map` needs `levels='continuous'`"),
        ({"method": "ect", "num_levels": 18}, "`num_levels` needs `levels='fixed'`"),
        ({"method": "ict", "num_levels": 18}, "`num_levels` needs `levels='fixed'`"),
        ({"method": "cd", "s0": 2}, "`s0` needs `levels='progressive'` or `'doubling'`"),
        ({"method": "scd", "s1": 20}, "`s1` needs `levels='progressive'` or `'doubling'`"),
        ({"method": "ect", "first_stage_steps": 3}, "needs `truncation`"),
        ({"method": "tcm", "first_stage_steps": 9, "max_train_steps": 9}, "must leave steps"),
        ({"method": "tcm", "levels": "doubling", "s0": 2, "s1": 8}, "`method='tcm'` needs `levels='mapping'`"),
        ({"method": "ict", "mu": 0.9}, "`mu` needs `target='ema'`"),
        ({"method": "ict", "target": "ema"}, "`target='ema'` needs `mu`"),
        ({"method": "scd", "huber_c": 0.1}, "`huber_c` needs `distance='pseudo_huber'`"),
        ({"method": "ct", "solver": "heun"}, "`solver` needs `source='teacher'`"),
        ({"method": "cd", "p_mean": 0.1}, "`p_mean` needs `level_distribution='lognormal'`"),
        ({"method": "meanflow", "boundary": "edm"}, "`flow_map` has the boundary 'euler'"),
        ({"method": "meanflow", "tangent_warmup_steps": 9}, "no meaning for a flow map"),
        ({"method": "cd", "levels": "mapping", "level_distribution": "lognormal"}, "needs `stages`"),
        ({"method": "ect", "mapping_base": 1.0}, "`mapping_base` must be above 1"),
    ],
    ids=str,
)
def test_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ConsistencyConfig(**options).resolve()


@pytest.mark.parametrize("truncation", [0.001, 200.0])
def test_a_truncation_outside_of_the_levels_is_refused(truncation, tmp_path):
    with pytest.raises(ValueError, match="`truncation` must lie between"):
        make_trainer(tmp_path, "tcm", truncation=truncation)


def test_forward_mode_is_refused_where_it_cannot_see(tmp_path):
    with pytest.raises(ValueError, match="goes neither with `compile`"):
        make_trainer(tmp_path, "scd", derivative="forward", compile=True)


def test_a_checkpoint_before_its_first_step_leaves_a_companion_as_it_is(tmp_path):
    trained = []
    for steps in (1, 100):  # the conversion has two
        AcceleratorState._reset_state(reset_partial_state=True)
        trainer = make_trainer(tmp_path / str(steps), "scd", checkpoint_steps=steps)
        trainer.train()
        trained.append(weights(trainer.companions["log_loss"].module))
    assert torch.equal(*trained)


@pytest.mark.parametrize("method", METHODS)
def test_a_resolved_config_resolves_to_itself(method):
    config = ConsistencyConfig(method=method).resolve()
    assert config.resolve() == config


def test_a_method_with_other_levels_drops_what_only_its_own_need():
    config = ConsistencyConfig(method="ect", levels="fixed", num_levels=18).resolve()
    assert (config.levels, config.stages, config.mapping_base) == ("fixed", None, None)


def test_what_a_method_chose_for_another_choice_goes_with_it():
    config = ConsistencyConfig(method="ct", target="student", levels="fixed", num_levels=18).resolve()
    assert (config.mu, config.mu_schedule, config.s0, config.s1) == (None, None, None, None)
