import json
import os
import shutil
import signal
from types import SimpleNamespace

import datasets
import diffusers
import pytest
import torch
from accelerate.state import AcceleratorState
from closed_form import Gaussian
from conftest import build_unet
from damaging import damage
from PIL import Image
from safetensors.torch import load_file

from cm_diffusers import ConsistencyConfig, ConsistencyPipeline, ConsistencyTrainer
from cm_diffusers.noise_levels import karras_grid
from cm_diffusers.preconditioning import Denoiser
from cm_diffusers.schedulers import ConsistencyScheduler
from cm_diffusers.training import checkpoints, health
from cm_diffusers.training.checkpoints import CheckpointError
from cm_diffusers.training.health import EXIT_CODE_PREEMPTED
from cm_diffusers.training.preparation import with_learning_rates

IMAGES = Gaussian(std=0.3).draw((64, 3, 8, 8), torch.Generator().manual_seed(0)).clamp(-1, 1)


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """accelerate keeps its precision for the life of a process."""
    AcceleratorState._reset_state(reset_partial_state=True)


def make_config(folder, **changes):
    values = {
        "distance": "pseudo_huber", "weighting": "inverse_gap", "num_levels": 6, "batch_size": 8, "max_train_steps": 4,
        "conversion_steps": 2, "teacher_check": False, "output_dir": str(folder), "tracker": "none",
        "sample_steps": 0, "checkpoint_steps": 0, "logging_steps": 1,
    }  # fmt: skip
    return ConsistencyConfig(**{**values, **changes})


def make_trainer(folder, teacher=None, images=IMAGES, **changes):
    teacher = teacher or (build_unet(), diffusers.DDPMScheduler())
    return ConsistencyTrainer(make_config(folder, **changes), teacher=teacher, train_dataset=images)


def weights(unet):
    return torch.cat([p.detach().flatten() for p in unet.parameters()])


SCHEDULERS = {
    "epsilon": diffusers.DDPMScheduler(),
    "v": diffusers.DDIMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True),
    "sample": diffusers.DPMSolverMultistepScheduler(prediction_type="sample"),
    "edm": diffusers.EDMEulerScheduler(),
    "flow": diffusers.FlowMatchEulerDiscreteScheduler(),
    "consistency": diffusers.CMStochasticIterativeScheduler(),
}


@pytest.mark.parametrize("family", SCHEDULERS)
def test_every_family_trains_saves_loads_and_samples(family, tmp_path):
    from_data = {"method": "ct", "num_levels": None, "s1": 10} if family == "consistency" else {}
    trainer = make_trainer(tmp_path, (build_unet(), SCHEDULERS[family]), **from_data)
    before = weights(trainer.unet).clone()
    pipeline = trainer.train()
    assert not torch.equal(weights(trainer.unet), before)
    assert weights(trainer.unet).isfinite().all()
    loaded = ConsistencyPipeline.from_pretrained(tmp_path)
    assert torch.equal(weights(loaded.unet), weights(pipeline.unet))
    assert loaded.scheduler.config.family == trainer.scheduler.config.family
    for nfe in (1, 2):
        images = loaded(batch_size=2, num_inference_steps=nfe, generator=torch.manual_seed(0), output_type="pt").images
        assert images.shape == (2, 3, 8, 8)
        assert images.isfinite().all()


def test_student_of_an_edm_teacher_loads_in_stock_diffusers_with_the_same_images(tmp_path, caplog):
    teacher = build_unet(num_class_embeds=4), diffusers.EDMDPMSolverMultistepScheduler()
    data = [{"images": image, "label": i % 4} for i, image in enumerate(IMAGES)]
    make_trainer(tmp_path, teacher, data, few_step_sigmas={2: [80.0, 1.0]}, num_levels=40).train()
    ours = ConsistencyPipeline.from_pretrained(tmp_path)
    assert "few_step_sigmas" not in caplog.text
    stock = diffusers.DiffusionPipeline.from_pretrained(tmp_path)
    assert "few_step_sigmas" in caplog.text  # which it does not know
    assert type(stock) is diffusers.ConsistencyModelPipeline
    assert ours.scheduler.config.few_step_sigmas == {"2": [80.0, 1.0]}
    for arguments in ({"num_inference_steps": 1}, {"num_inference_steps": 4}, {"timesteps": [22, 0]}):
        arguments = {"num_inference_steps": None, "batch_size": 3, "class_labels": [0, 3, 1], **arguments}
        images = [p(generator=torch.manual_seed(0), output_type="np", **arguments).images for p in (ours, stock)]
        assert (images[0] == images[1]).all()


@pytest.mark.parametrize("boundary", ["edm", "euler", "lcm"])
def test_scheduler_step_is_the_function_that_was_trained(boundary, tmp_path):
    trainer = make_trainer(tmp_path, boundary=boundary)
    pipeline = trainer.train()
    f, scheduler = Denoiser(pipeline.unet, trainer.phases[-1].objective.student.preconditioning), pipeline.scheduler
    config = scheduler.config
    grid = karras_grid(6, config.sigma_min, config.sigma_max)
    scheduler.set_timesteps(sigmas=grid.flip(0).tolist())
    scheduler.register_to_config(clip_denoised=False)
    for sigma, t in zip(grid.flip(0), scheduler.timesteps, strict=True):
        x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * (1 + sigma)
        with torch.no_grad():
            state = x / scheduler.state_scale(sigma)
            output = pipeline.unet(scheduler.scale_model_input(state, t), t).sample
            expected = f(x, sigma)
        torch.testing.assert_close(scheduler.step(output, t, state).denoised, expected, atol=1e-6, rtol=1e-6)


def test_ct_trains_without_a_teacher(tmp_path):
    unet_config = tmp_path / "unet"
    build_unet().save_config(unet_config)
    config = make_config(tmp_path / "out", method="ct", unet_config=str(unet_config), num_levels=None, s1=10)
    pipeline = ConsistencyTrainer(config, train_dataset=IMAGES).train()
    assert pipeline.scheduler.is_stock


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"time_embedding_type": "fourier"}, "Take 'positional'"),
        ({"time_embedding_type": "learned", "num_train_timesteps": 1000}, "knows whole times alone"),
        ({"out_channels": 5}, "maps 3 channels to 5"),
    ],
)
def test_new_networks_that_cannot_be_students_are_refused(changes, message, tmp_path):
    build_unet(**changes).save_config(tmp_path / "unet")
    config = make_config(tmp_path / "out", method="ect", unet_config=str(tmp_path / "unet"), num_levels=None)
    with pytest.raises(ValueError, match=message):
        ConsistencyTrainer(config, train_dataset=IMAGES)


def test_a_new_network_predicts_no_variance(tmp_path):
    build_unet(out_channels=6).save_config(tmp_path / "unet")
    config = make_config(tmp_path / "out", method="ect", unet_config=str(tmp_path / "unet"), num_levels=None)
    assert ConsistencyTrainer(config, train_dataset=IMAGES).unet.config.out_channels == 3


@pytest.mark.parametrize("method", ["cd", "ect", "ecd", "tcm"])
def test_half_precision_leaves_no_weight_without_gradient(method, tmp_path):
    """Torch up to 2.9 keeps what autocast has cast for the target, without gradient, for the student."""
    changes = {"mu": 0.0} if method == "cd" else {"num_levels": None}
    teacher = build_unet(add_attention=False), diffusers.DDPMScheduler()  # the bias of keys changes nothing
    trainer = make_trainer(tmp_path, teacher, method=method, mixed_precision="bf16", conversion_steps=0, **changes)
    before = {name: weight.detach().clone() for name, weight in trainer.unet.named_parameters()}
    trainer.train()
    assert [n for n, weight in trainer.unet.named_parameters() if torch.equal(weight, before[n])] == []


def test_channels_that_lpips_does_not_know_are_refused_at_once(tmp_path):
    unet = build_unet(in_channels=4, out_channels=4)
    config = make_config(tmp_path, distance="lpips", weighting="uniform")
    with pytest.raises(ValueError, match="compares grey or RGB images, not 4 channels"):
        ConsistencyTrainer(config, (unet, diffusers.DDPMScheduler()), torch.rand(8, 4, 8, 8))


@pytest.mark.parametrize(("method", "steps"), [("ect", 2), ("ect", 0), ("cd", 0)])
def test_the_teacher_is_checked_where_something_is_learned_of_it(method, steps, tmp_path, caplog):
    changes = {"method": method, "num_levels": None, "conversion_steps": steps, "teacher_check": True}
    trainer = make_trainer(tmp_path, **changes)
    if method == "cd":
        with pytest.raises(ValueError, match="does not denoise"):
            trainer.check_teacher()
        return
    trainer.train()  # of data: it is told, and trained
    assert ("does not denoise" in caplog.text) == bool(steps)
    trainer.step = steps
    assert trainer.check_teacher() is None


@pytest.mark.parametrize("method", ["cd", "ecd"])
@pytest.mark.parametrize("scheduler", [SCHEDULERS["consistency"], ConsistencyScheduler()], ids=["stock", "ours"])
def test_consistency_models_are_not_distilled(method, scheduler, tmp_path):
    with pytest.raises(ValueError, match="no ODE to be distilled"):
        make_trainer(tmp_path, (build_unet(), scheduler), method=method, num_levels=None)


def test_a_compiled_network_can_be_a_teacher(tmp_path):
    unet = build_unet()
    compiled = torch.compile(unet)
    trainer = make_trainer(tmp_path, (compiled, diffusers.DDPMScheduler()), target="student")
    assert torch.equal(weights(trainer.teacher.unet), weights(unet))
    trainer.train()


def test_a_network_of_its_own_beside_a_teacher_is_refused(tmp_path):
    with pytest.raises(ValueError, match="unet_config.*without a teacher"):
        make_trainer(tmp_path, unet_config=str(tmp_path / "unet"))


def test_a_conversion_of_nothing_is_told(tmp_path, caplog):
    trainer = make_trainer(tmp_path, (build_unet(), SCHEDULERS["edm"]))
    assert [phase.name for phase in trainer.phases] == ["cd"]
    assert "`conversion_steps` has no effect" in caplog.text


@pytest.mark.parametrize(
    "changes",
    [
        {"distance": "l1"}, {"distance": "l2"}, {"solver": "euler"}, {"target": "student"}, {"mu": 0.0},
        {"levels": "progressive", "s0": 2, "s1": 20, "mu_schedule": "progressive", "num_levels": None},
        {"levels": "doubling", "s0": 2, "s1": 8, "num_levels": None}, {"level_distribution": "lognormal"},
        {"source": "data"}, {"weighting": "uniform"}, {"optimizer": "adamw"},
        {"optimizer": "radam", "lr_schedule": "constant"},
        {"mixed_precision": "bf16"}, {"gradient_accumulation_steps": 2}, {"max_grad_norm": None},
        {"random_flip": True}, {"conversion_steps": 0}, {"num_workers": 1},
    ],
    ids=str,
)  # fmt: skip
def test_every_choice_can_be_overridden(changes, tmp_path):
    trainer = make_trainer(tmp_path, **changes)
    before = weights(trainer.unet).clone()
    trainer.train()
    after = weights(trainer.unet)
    assert after.isfinite().all()
    assert not torch.equal(after, before)


def test_accumulation_equals_a_larger_batch(tmp_path):
    """A batch of 16, two of 8 and four of 4 are the same training, up to rounding."""
    losses, final = [], []
    for size in (16, 8, 4):
        AcceleratorState._reset_state(reset_partial_state=True)
        accumulation = {"batch_size": size, "gradient_accumulation_steps": 16 // size}
        trainer = make_trainer(tmp_path / str(size), random_flip=True, **accumulation)
        losses.append(losses_of(trainer))
        final.append(weights(trainer.unet))
    for other in (1, 2):
        torch.testing.assert_close(losses[other], losses[0], rtol=1e-5, atol=0)
        torch.testing.assert_close(final[other], final[0], rtol=0, atol=1e-5)


def losses_of(trainer):
    """Train, and return the mean loss of every step."""
    losses, stepper = [], trainer.stepper

    def recorded(phase, step, batches):
        record = stepper(phase, step, batches)
        losses.append(record.losses.mean())
        return record

    trainer.stepper = recorded
    trainer.train()
    return torch.stack(losses)


@pytest.mark.parametrize(
    "changes",
    [{"compile": True}, {"compile": True, "target": "student"}, {"channels_last": True},
     {"gradient_checkpointing": True}, {"compile": True, "gradient_checkpointing": True, "channels_last": True}],
    ids=str,
)  # fmt: skip
def test_ways_to_be_faster_compute_the_same(changes, tmp_path, monkeypatch):
    """And what is compiled is compiled once, whatever N."""
    compiled = torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda net, **options: compiled(net, backend="aot_eager", **options)
    )
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    same = {"levels": "doubling", "s0": 2, "s1": 16, "num_levels": None, "max_train_steps": 8, "num_workers": 1}
    same |= {"target": changes.get("target")}
    plain = make_trainer(tmp_path / "plain", **same)
    expected = losses_of(plain)
    AcceleratorState._reset_state(reset_partial_state=True)
    trainer = make_trainer(tmp_path / "fast", **{**same, **changes})
    graphs, advance = [], trainer.advance

    def counted(phase, batches):
        record = advance(phase, batches)
        graphs.append(counters["stats"]["unique_graphs"])
        return record

    trainer.advance = counted
    torch.testing.assert_close(losses_of(trainer), expected, rtol=1e-4, atol=0)
    num_levels = [trainer.phases[-1].describe(step)["num_levels"] for step in (0, 7)]
    assert num_levels[1] > num_levels[0]
    if "compile" in changes:
        assert 0 < graphs[2] == graphs[-1]  # conversion, and then cd, with all its N
    loaded = ConsistencyPipeline.from_pretrained(tmp_path / "fast")
    torch.testing.assert_close(weights(loaded.unet), weights(plain.averages.ema.network), rtol=0, atol=1e-4)


def test_a_teacher_in_low_precision_is_a_copy(tmp_path):
    unet = build_unet()
    trainer = make_trainer(tmp_path, (unet, diffusers.DDPMScheduler()), teacher_dtype="bfloat16")
    trainer.train()
    assert trainer.teacher.unet.dtype == torch.bfloat16
    assert unet.dtype == trainer.unet.dtype == torch.float32


@pytest.fixture
def image_folder(tmp_path):
    """Twelve pictures, the fifth of them torn."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for index in range(12):
        Image.new("RGB", (9, 11), (20 * index, 0, 99)).save(folder / f"{index:02d}.png")
    torn = folder / "04.png"
    torn.write_bytes(torn.read_bytes()[:40])
    return folder


@pytest.mark.parametrize("streaming", [False, True])
def test_a_folder_of_images_with_a_torn_one(streaming, image_folder, tmp_path, caplog):
    settings = {"dataset": str(image_folder), "streaming": streaming, "max_train_steps": 6, "batch_size": 4}
    make_trainer(tmp_path / "out", images=None, on_bad_image="skip", **settings).train()
    assert "04.png" in caplog.text
    with pytest.raises(ValueError, match="04.png"):
        make_trainer(tmp_path / "out", images=None, **settings).train()


def test_guided_class_conditional_teacher(tmp_path):
    unet = build_unet(num_class_embeds=5)
    data = [(image, i % 4) for i, image in enumerate(IMAGES)]
    trainer = make_trainer(
        tmp_path, (unet, diffusers.DDPMScheduler()), data, guidance_scale=2.0, null_class_label=4, label_dropout=0.5
    )
    trainer.train()
    loaded = ConsistencyPipeline.from_pretrained(tmp_path)
    assert loaded.config.null_class_label == 4
    assert len(loaded(batch_size=2, class_labels=[0, 1], guidance_scale=1.5).images) == 2


def test_evaluation_weights_are_an_average_of_their_own(tmp_path):
    trainer = make_trainer(tmp_path, max_train_steps=8, learning_rate=1e-2, ema_half_life=1000, ema_rampup=None)
    pipeline = trainer.train()
    assert not torch.equal(weights(pipeline.unet), weights(trainer.unet))
    assert not torch.equal(weights(pipeline.unet), weights(trainer.averages.target.network))


def stream_of_images():
    pixels = ((IMAGES / 2 + 0.5).clamp(0, 1) * 255).byte().permute(0, 2, 3, 1).numpy()
    columns = {"image": [Image.fromarray(image.squeeze()) for image in pixels]}
    return datasets.Dataset.from_dict(columns).to_iterable_dataset(num_shards=2)


@pytest.mark.parametrize(("dropout", "streaming"), [(0.0, False), (0.2, False), (0.0, True)])
def test_resumed_run_equals_an_uninterrupted_one_bit_for_bit(tmp_path, dropout, streaming):
    teacher = build_unet(dropout=dropout), diffusers.DDPMScheduler()
    settings = {"max_train_steps": 14, "checkpoint_steps": 5, "gradient_accumulation_steps": 2, "num_workers": 2}
    settings |= {"random_flip": True, "images": stream_of_images() if streaming else IMAGES}
    whole = make_trainer(tmp_path / "whole", teacher, **settings)
    whole.train()

    broken = make_trainer(tmp_path / "broken", teacher, **settings)
    follow = broken.averages.follow

    def stop_at_seven(*arguments):
        follow(*arguments)
        if broken.step == 7:
            raise KeyboardInterrupt

    broken.averages.follow = stop_at_seven
    with pytest.raises(KeyboardInterrupt):
        broken.train()
    resumed = make_trainer(tmp_path / "broken", teacher, resume="auto", **settings)
    resumed.train()
    assert torch.equal(weights(resumed.unet), weights(whole.unet))
    assert torch.equal(weights(resumed.averages.ema.network), weights(whole.averages.ema.network))


@pytest.mark.parametrize("how", ["truncate", "empty", "flip", "delete"])
def test_damage_to_any_file_of_a_checkpoint_falls_back_to_the_one_before(how, tmp_path, caplog):
    settings = {"checkpoint_steps": 2, "checkpoint_limit": 5, "max_train_steps": 4}
    make_trainer(tmp_path, **settings).train()
    before, newest = sorted((tmp_path / "checkpoints").iterdir())[-2:]
    files = sorted(path.name for path in newest.iterdir())
    assert files == [
        "ema.safetensors", "manifest.json", "optimizer.json", "optimizer.safetensors", "state.json",
        "student.safetensors", "target.safetensors",
    ]  # fmt: skip
    for name in files:
        whole = (newest / name).read_bytes()
        damage(newest / name, how)
        caplog.clear()
        resumed = make_trainer(tmp_path, resume="auto", **settings)
        assert resumed.memory.resume("auto")[0] == int(before.name[-8:]) == 4
        assert str(newest) in caplog.text
        (newest / name).write_bytes(whole)
    assert resumed.memory.resume("auto")[0] == 6


def test_a_full_disk_is_a_clear_error_and_the_last_checkpoint_stays(tmp_path):
    resource = pytest.importorskip("resource")
    settings = {"checkpoint_steps": 2, "max_train_steps": 4}
    trainer = make_trainer(tmp_path, **settings)
    whole, follow = tmp_path / "checkpoints" / "step-00000002", trainer.averages.follow
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill_the_disk_at_three(*arguments):
        follow(*arguments)
        if trainer.step == 3:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))

    trainer.averages.follow = fill_the_disk_at_three
    try:
        with pytest.raises(CheckpointError, match=f"step-00000004 cannot be written.*The last checkpoint is {whole}"):
            trainer.train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == [whole.name]
    resumed = make_trainer(tmp_path, resume="auto", **settings)
    resumed.train()
    assert resumed.step == 6


def test_the_rates_follow_the_width_unless_they_are_given(tmp_path):
    teacher = build_unet(block_out_channels=(64,)), diffusers.DDPMScheduler()
    trainer = make_trainer(tmp_path, teacher)
    assert [phase.learning_rate_at.peak for phase in trainer.phases] == pytest.approx([1.2e-3, 4e-4])
    assert trainer.config.learning_rate == pytest.approx(4e-4)
    trainer = make_trainer(tmp_path, learning_rate=1e-5, conversion_learning_rate=1e-2)
    assert [phase.learning_rate_at.peak for phase in trainer.phases] == [1e-2, 1e-5]


def test_a_network_that_does_not_say_how_wide_it_is_needs_rates():
    network = SimpleNamespace(config=SimpleNamespace())
    with pytest.raises(ValueError, match="set both learning rates"):
        with_learning_rates(ConsistencyConfig(learning_rate=1e-4), network)
    given = ConsistencyConfig(learning_rate=1e-4, conversion_learning_rate=3e-4)
    assert with_learning_rates(given, network) == given


def test_resuming_another_run_is_refused_with_the_difference(tmp_path):
    make_trainer(tmp_path, checkpoint_steps=2).train()
    with pytest.raises(ValueError, match="learning_rate was 0.001 and is 0.5"):
        make_trainer(tmp_path, checkpoint_steps=2, resume="auto", learning_rate=0.5).train()


def test_moments_keep_the_memory_format_of_their_weights(tmp_path):
    settings = {"checkpoint_steps": 3, "max_train_steps": 6, "conversion_steps": 0, "channels_last": True}
    whole = make_trainer(tmp_path, **settings)
    whole.train()
    shutil.rmtree(sorted((tmp_path / "checkpoints").iterdir())[-1])
    resumed = make_trainer(tmp_path, resume="auto", **settings)
    resumed.train()
    assert torch.equal(weights(resumed.unet), weights(whole.unet))


def test_resuming_in_another_precision_is_refused(tmp_path):
    make_trainer(tmp_path, checkpoint_steps=2).train()
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.raises(ValueError, match="the precision was 'no' and is 'bf16'"):
        make_trainer(tmp_path, checkpoint_steps=2, resume="auto", mixed_precision="bf16").train()


def test_a_new_run_is_not_mixed_with_an_earlier_one(tmp_path):
    make_trainer(tmp_path, checkpoint_steps=2).train()
    before = sorted((tmp_path / "checkpoints").iterdir())
    with pytest.raises(ValueError, match="an earlier run, the last step-0000000.*`resume: auto`"):
        make_trainer(tmp_path, checkpoint_steps=2)
    assert sorted((tmp_path / "checkpoints").iterdir()) == before


def test_a_step_is_saved_once(tmp_path, monkeypatch):
    written, write_files = [], checkpoints.write_files
    monkeypatch.setattr(
        checkpoints, "write_files", lambda folder, write: written.append(folder) or write_files(folder, write)
    )
    trainer = make_trainer(tmp_path)
    assert trainer.save_checkpoint() == trainer.save_checkpoint() == written[0]
    assert len(written) == 1


class Poisoned:
    """An objective whose loss is not a number where `when(step)`."""

    def __init__(self, phase, when):
        self._losses, self.when = phase.objective.losses, when
        object.__setattr__(phase, "objective", self)

    def losses(self, images, step, random, **conditioning):
        losses = self._losses(images, step, random, **conditioning)
        return losses._replace(values=losses.values * (float("nan") if self.when(step) else 1.0))


@pytest.mark.parametrize("optimizer", ["adam", "radam"])
def test_non_finite_gradients_never_reach_the_weights(optimizer, tmp_path):
    trainer = make_trainer(tmp_path, max_train_steps=50, conversion_steps=0, optimizer=optimizer)
    before = weights(trainer.unet).clone()
    Poisoned(trainer.phases[-1], lambda step: True)
    with pytest.raises(FloatingPointError, match="10 steps in a row"):
        trainer.train()
    assert torch.equal(weights(trainer.unet), before)
    assert trainer.watch.skipped == 10
    (saved,) = (tmp_path / "checkpoints").iterdir()
    student = load_file(saved / "student.safetensors")
    assert all(torch.equal(student[name], weight) for name, weight in trainer.unet.named_parameters())


def test_dumps_of_bad_steps_do_not_fill_the_disk_or_end_the_run(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(health, "MOST_DUMPS", 2)
    trainer = make_trainer(tmp_path, max_train_steps=8, conversion_steps=0)
    Poisoned(trainer.phases[-1], lambda step: step % 2)
    (tmp_path / "bad-steps").write_text("no folder")
    trainer.train()
    assert trainer.watch.skipped == 4
    assert "cannot be written" in caplog.text
    (tmp_path / "bad-steps").unlink()
    other = make_trainer(tmp_path, max_train_steps=8, conversion_steps=0)
    Poisoned(other.phases[-1], lambda step: step % 2)
    other.train()
    assert len(list((tmp_path / "bad-steps").glob("*.json"))) == 2


@pytest.mark.parametrize("optimizer", ["adam", "radam"])
def test_a_bad_step_is_left_out_counted_and_dumped(optimizer, tmp_path, caplog):
    trainer = make_trainer(tmp_path, max_train_steps=8, conversion_steps=0, optimizer=optimizer, max_bad_steps=2)
    Poisoned(trainer.phases[-1], lambda step: step in (2, 4))
    seen, follow = [], trainer.averages.follow

    def watched(*arguments):
        moments = [state["exp_avg"].clone() for state in trainer.optimizer.state.values()]
        seen.append((weights(trainer.unet).clone(), torch.cat([moment.flatten() for moment in moments])))
        follow(*arguments)

    trainer.averages.follow = watched
    trainer.train()
    unchanged = [step for step in range(1, 8) if all(map(torch.equal, seen[step], seen[step - 1]))]
    assert unchanged == [2, 4]
    assert trainer.watch.skipped == 2
    assert "Step 2 is skipped" in caplog.text
    report = json.loads((tmp_path / "bad-steps" / "step-00000002-rank-0.json").read_text())
    assert (report["phase"], report["losses"], report["images_are_finite"]) == ("cd", ["nan"], [True])
    dumped = load_file(tmp_path / "bad-steps" / "step-00000002-rank-0.safetensors")
    # What was dumped can be taken again.
    batch = {name.split(".")[0]: value for name, value in dumped.items()}
    assert trainer.stepper.losses(trainer.phases[-1], 2, batch).values.isnan().all()
    assert trainer.stepper.losses(trainer.phases[-1], 3, batch).values.isfinite().all()


def test_sigterm_saves_and_ends_with_its_own_code(tmp_path):
    settings = {"checkpoint_steps": 100, "max_train_steps": 10}
    whole = make_trainer(tmp_path / "whole", **settings)
    whole.train()
    trainer = make_trainer(tmp_path / "told", **settings)
    stepper = trainer.stepper

    def told_at_three(phase, step, batches):
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return stepper(phase, step, batches)

    trainer.stepper = told_at_three
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit, match=r"the run is saved in .*step-0000000\d") as stopped:
        trainer.train()
    assert stopped.value.code == EXIT_CODE_PREEMPTED == 75
    assert trainer.step < 6
    assert signal.getsignal(signal.SIGTERM) is before
    resumed = make_trainer(tmp_path / "told", resume="auto", **settings)
    resumed.train()
    assert torch.equal(weights(resumed.averages.ema.network), weights(whole.averages.ema.network))


def test_a_resumed_run_may_split_its_batch_otherwise(tmp_path):
    settings = {"checkpoint_steps": 3, "max_train_steps": 6, "conversion_steps": 0}
    whole = make_trainer(tmp_path, **settings)
    whole.train()
    shutil.rmtree(sorted((tmp_path / "checkpoints").iterdir())[-1])
    resumed = make_trainer(
        tmp_path, resume="auto", batch_size=2, **settings, gradient_accumulation_steps=4, num_workers=2
    )
    resumed.train()
    torch.testing.assert_close(weights(resumed.unet), weights(whole.unet), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 4}, "the global batch size was 8 and is 4"),
        ({"images": IMAGES.flip(0)}, "the dataset's digest was .* and is"),
        ({"images": IMAGES[:-1]}, "the dataset's .* was 64 and is 63"),
        ({"images": "stream", "num_workers": 2}, "the workers was 0 and is 2"),
        (
            {"teacher": (build_unet(), diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2"))},
            "the scheduler's beta_schedule was 'linear' and is 'squaredcos_cap_v2'",
        ),
        ({"teacher": (build_unet(seed=1), diffusers.DDPMScheduler())}, "the teacher's weights was .* and is"),
        (
            {"teacher": (build_unet(), diffusers.DDPMScheduler(prediction_type="sample"))},
            "the teacher's scheduler's prediction_type was 'epsilon' and is 'sample'",
        ),
    ],
    ids=str,
)
def test_resuming_with_other_data_or_another_teacher_is_refused(changes, message, tmp_path):
    first = {"images": stream_of_images()} if changes.get("images") == "stream" else {}
    make_trainer(tmp_path, checkpoint_steps=6, **first).train()
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, checkpoint_steps=6, resume="auto", **{**changes, **first}).train()


def test_samples_and_numbers_are_tracked(tmp_path):
    trainer = make_trainer(tmp_path, sample_steps=3, tracker="tensorboard", num_samples=4)
    trainer.train()
    assert (tmp_path / "samples" / "step-00000006-nfe-2.png").exists()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "logs" / "cm_diffusers"))
    events.Reload()
    tags = events.Tags()
    names = "loss grad_norm images_per_second memory_gib lr num_levels mu ema_decay skipped_steps".split()
    names += [f"milliseconds/{part}" for part in ("data", "forward", "backward", "optimizer", "rest")]
    assert {f"cd/{name}" for name in names} <= set(tags["scalars"])
    bins = [tag for tag in tags["scalars"] if tag.startswith("cd/loss_at_sigma/")]
    assert 1 < len(bins) <= 8
    assert {"samples/nfe_1", "samples/nfe_2"} <= set(tags["images"])


def test_samples_are_drawn_no_more_at_once_than_a_step_trains_on(tmp_path, monkeypatch):
    sizes, draw = [], ConsistencyPipeline.__call__

    def noted(self, batch_size=1, **arguments):
        sizes.append(batch_size)
        return draw(self, batch_size, **arguments)

    monkeypatch.setattr(ConsistencyPipeline, "__call__", noted)
    make_trainer(tmp_path, num_samples=20).train()
    assert sizes == [8, 8, 4] and (tmp_path / "samples.png").exists()


@pytest.mark.parametrize("name", ["sample", "eval"])
def test_steps_that_the_student_cannot_take_are_refused_at_the_start(name, tmp_path):
    with pytest.raises(ValueError, match=f"`{name}_nfes` holds 7, which the student cannot take"):
        make_trainer(tmp_path, **{f"{name}_nfes": [1, 7], f"{name}_steps": 2})


def test_a_student_is_kept_when_its_samples_fail(tmp_path, monkeypatch, caplog):
    def out_of_memory(*_, **__):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(ConsistencyPipeline, "__call__", out_of_memory)
    trained = make_trainer(tmp_path).train()
    assert "without its record or samples" in caplog.text
    assert torch.equal(weights(ConsistencyPipeline.from_pretrained(tmp_path).unet), weights(trained.unet))


def test_the_saved_student_describes_itself(tmp_path):
    make_trainer(tmp_path, sigma_max=40.0, boundary="euler", few_step_sigmas={2: [40, 1]}).train()
    config = json.loads((tmp_path / "scheduler" / "scheduler_config.json").read_text())
    assert (config["family"], config["prediction_type"], config["sigma_max"]) == ("vp", "v_prediction", 40.0)
    assert config["few_step_sigmas"] == {"2": [40.0, 1.0]}
    assert config["num_levels"] == 6


@pytest.mark.parametrize("family", ["v", "edm", "flow"])
def test_few_step_sampling_stays_on_the_levels_of_training(family, tmp_path):
    trainer = make_trainer(tmp_path, (build_unet(), SCHEDULERS[family]), num_levels=7)
    now = trainer.scheduler.config
    grid = karras_grid(7, now.sigma_min, now.sigma_max)
    for steps in (1, 2, 3, 7):
        trainer.scheduler.set_timesteps(steps)
        assert trainer.scheduler.sigmas[0] == grid[-1]
        for sigma in trainer.scheduler.sigmas:
            assert ((grid - sigma).abs() / grid).min() < 1e-5
    with pytest.raises(ValueError, match="7 levels"):
        trainer.scheduler.set_timesteps(8)


@pytest.mark.parametrize(("method", "least", "most"), [("ect", 0.6, 0.8), ("ecd", 0.6, 0.8), ("tcm", 1.0, 1.3)])
def test_where_there_is_no_grid_the_second_level_is_one_that_stock_diffusers_has(method, least, most, tmp_path):
    scheduler = make_trainer(tmp_path, (build_unet(), SCHEDULERS["edm"]), method=method, num_levels=None).scheduler
    assert least <= scheduler.config.few_step_sigmas["2"][1] < most
    stock = diffusers.CMStochasticIterativeScheduler.from_config(dict(scheduler.config))
    stock.set_timesteps(timesteps=scheduler.stock_timesteps(2))
    scheduler.set_timesteps(2)
    torch.testing.assert_close(stock.sigmas[:2], scheduler.sigmas[:2])


class TestRefusedBeforeTraining:
    def refuse(self, tmp_path, message, error=ValueError, **arguments):
        with pytest.raises(error, match=message):
            make_trainer(tmp_path / "out", **arguments)

    def test_range_outside_the_teachers(self, tmp_path):
        self.refuse(tmp_path, "leaves the teacher's", sigma_max=500.0)

    def test_nan_images(self, tmp_path):
        images = IMAGES.clone()
        images[37, 1, 2, 3] = float("nan")
        self.refuse(tmp_path, "row 37 .*not finite", images=images)

    def test_a_missing_column(self, tmp_path):
        import datasets

        table = datasets.Dataset.from_dict({"img": [[[0]]], "label": [1]})
        self.refuse(tmp_path, "'imag'.*Did you mean 'img'", images=table, image_column="imag")

    def test_a_damaged_checkpoint_that_is_asked_for(self, tmp_path):
        make_trainer(tmp_path / "out", checkpoint_steps=6).train()
        checkpoint = next((tmp_path / "out" / "checkpoints").iterdir())
        (checkpoint / "state.json").write_text("{}")
        trainer = make_trainer(tmp_path / "out", resume=str(checkpoint), checkpoint_steps=6)
        with pytest.raises(ValueError, match="state.json is not what was written"):
            trainer.train()
        assert trainer.step == 0
        assert (tmp_path / "out" / "model_index.json").exists()

    def test_wrong_shape(self, tmp_path):
        self.refuse(tmp_path, r"\(1, 8, 8\).*\(3, 8, 8\)", images=IMAGES[:, :1])

    def test_size_that_the_network_cannot_halve(self, tmp_path):
        unet = build_unet(
            sample_size=9, block_out_channels=(8, 8), down_block_types=("DownBlock2D",) * 2,
            up_block_types=("UpBlock2D",) * 2,
        )  # fmt: skip
        with pytest.raises(ValueError, match="multiples of 2 .* 9 x 9"):
            make_trainer(tmp_path, (unet, diffusers.DDPMScheduler()), IMAGES.new_zeros(4, 3, 9, 9))

    def test_no_images(self, tmp_path):
        self.refuse(tmp_path, "empty", images=IMAGES[:0])

    def test_no_teacher(self, tmp_path):
        with pytest.raises(ValueError, match="needs a `teacher`"):
            ConsistencyTrainer(make_config(tmp_path), train_dataset=IMAGES)

    def test_no_dataset(self, tmp_path):
        with pytest.raises(ValueError, match="needs a `dataset`"):
            ConsistencyTrainer(make_config(tmp_path), teacher=(build_unet(), diffusers.DDPMScheduler()))

    def test_class_conditional_without_labels(self, tmp_path):
        teacher = build_unet(num_class_embeds=3), diffusers.DDPMScheduler()
        self.refuse(tmp_path, "no label", teacher=teacher)

    def test_a_null_class_of_no_classes_or_of_others(self, tmp_path):
        self.refuse(tmp_path, "not class-conditional", null_class_label=0, label_dropout=0.1)
        teacher = build_unet(num_class_embeds=3), diffusers.DDPMScheduler()
        self.refuse(tmp_path, "one of the network's 3 classes, got 3", teacher=teacher, null_class_label=3)

    def test_output_that_cannot_be_written(self, tmp_path):
        (tmp_path / "out").write_text("a file")
        self.refuse(tmp_path, "cannot be written")

    def test_an_untrained_teacher(self, tmp_path):
        trainer = make_trainer(tmp_path, teacher_check=True)
        with pytest.raises(ValueError, match="does not denoise"):
            trainer.train()
        assert trainer.step == 0
