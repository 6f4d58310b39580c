"""What only a GPU shows: `CUDA_VISIBLE_DEVICES=0 python -m pytest -n 0 tests/test_gpu.py`.

Noise is the same on every device, so whole runs are: what a GPU trains is compared with what the CPU trains.
"""

from __future__ import annotations

import contextlib
import sys
from typing import Any

import diffusers
import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import build_unet
from diffusers import LCMScheduler
from launching import WHOLE, assert_same_training, launch, run
from stable_diffusion import make_sdxl, make_stable_diffusion
from text_students import make_captioned, make_text_student

from cm_diffusers import (
    ConsistencyConfig,
    ConsistencyInpaintPipeline,
    ConsistencyPipeline,
    ConsistencyScheduler,
    ConsistencyTrainer,
)
from cm_diffusers.doctor import GPU_WORKSPACE, WORKING_SPACE, examine, measure_footprint
from cm_diffusers.evaluation import Evaluator, Features, Reference
from cm_diffusers.evaluation.sampling import student_sampler
from cm_diffusers.training.methods import METHODS
from cm_diffusers.training.objectives.pairs import same_dropout
from cm_diffusers.training.objectives.tangents import finite_difference, forward_mode
from cm_diffusers.training.precompute import precompute
from cm_diffusers.training.randomness import SampleRandom

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="a GPU is needed, and made visible")

GPU, CPU = torch.device("cuda"), torch.device("cpu")
IMAGES = torch.rand(64, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
RUNS = {
    **{name: {} for name in METHODS if name != "lcm"}, "cd": {"num_levels": 6},
    "adversarial": {"method": "scd", "real_data": 0.25, "adversarial_weight": 0.1},
}  # fmt: skip
HALF = {"bf16": {"mixed_precision": "bf16"}, "fp16": {"mixed_precision": "fp16"}}


@pytest.fixture(autouse=True)
def exact(monkeypatch):
    """The same convolution every time; and accelerate forgets its device and precision, which it keeps for good."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    torch.cuda.set_sync_debug_mode("default")


def make_trainer(folder: Any, method: str = "cd", device: torch.device = GPU, **changes: Any) -> ConsistencyTrainer:
    """A trainer on the device, without TF32."""
    AcceleratorState._reset_state(reset_partial_state=True)
    values = {
        "method": method, "batch_size": 8, "max_train_steps": 6, "conversion_steps": 2, "teacher_check": False,
        "tracker": "none", "sample_steps": 0, "checkpoint_steps": 0, "num_samples": 4, "output_dir": str(folder),
        "allow_tf32": False, **RUNS.get(method, {}),
    }  # fmt: skip
    if method in ("cd", "ct"):
        values |= {"distance": "pseudo_huber", "weighting": "inverse_gap"}
    teacher, data = changes.pop("teacher", None), changes.pop("data", IMAGES)
    teacher = teacher or (build_unet(sample_size=16), diffusers.DDPMScheduler())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "1" if device == CPU else "0")
        trainer = ConsistencyTrainer(ConsistencyConfig.from_dict({**values, **changes}), teacher, data)
    assert trainer.accelerator.device.type == device.type
    if trainer.accelerator.scaler is not None:
        trainer.accelerator.scaler._init_scale = 64.0  # not one that it has to find first
    return trainer


def take_steps(trainer: ConsistencyTrainer, until: int | None = None, free: int | None = None) -> list[float]:
    """The steps of a trainer, with nothing around them. Returns their losses.

    Args:
        until (`int`, *optional*): how many; all of them if it is not given.
        free (`int`, *optional*): from this step on, an operation that makes the host wait is an error.
    """
    batches, losses = iter(trainer.batches), []
    while trainer.step < (until or trainer.total_steps):
        if trainer.step == free:
            torch.cuda.set_sync_debug_mode("error")
        phase = next(p for p in trainer.phases if trainer.step < p.start + p.steps)
        if trainer.step == phase.start:
            trainer.averages.restart(trainer.unet, phase is trainer.phases[-1])
        record = trainer.advance(phase, batches)
        trainer.watch.after(record)
        losses.append(record.losses.mean())
    torch.cuda.set_sync_debug_mode("default")
    assert trainer.watch.skipped == 0
    return torch.stack(losses).tolist()


def weights(network: torch.nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().float().flatten() for parameter in network.parameters()]).cpu()


# Training -----------------------------------------------------------------------------------------------------------


def test_noise_is_the_same_on_both():
    one, other = (
        SampleRandom(torch.arange(16), device).normal_like(torch.zeros(16, 3, 9, 9, device=device))
        for device in (GPU, CPU)
    )
    torch.testing.assert_close(one.cpu(), other, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("method", RUNS)
def test_a_run_is_that_of_the_cpu(method, tmp_path):
    losses, ends = [], []
    for device in (GPU, CPU):  # one after the other: accelerate has one device at a time
        trainer = make_trainer(tmp_path / device.type, method, device)
        losses.append(take_steps(trainer))
        ends.append(weights(trainer.unet))
    assert losses[0] == pytest.approx(losses[1], rel=2e-3)
    assert (ends[0] - ends[1]).norm() < 1e-3 * ends[1].norm()


@pytest.mark.parametrize("precision", ["no", *HALF])
@pytest.mark.parametrize("method", RUNS)
def test_no_step_makes_the_host_wait(method, precision, tmp_path):
    trainer = make_trainer(tmp_path, method, max_train_steps=8, mixed_precision=precision)
    # Tables of the noise levels are made at first; the second stage of `tcm` begins halfway.
    assert torch.tensor(take_steps(trainer, free=trainer.phases[-1].start + 5)).isfinite().all()


@pytest.mark.parametrize("precision", HALF)
@pytest.mark.parametrize("method", ["cd", "ect", "scd", "meanflow"])
def test_half_precision_trains_alike(method, precision, tmp_path):
    half = take_steps(make_trainer(tmp_path / "half", method, mixed_precision=precision))
    assert half == pytest.approx(take_steps(make_trainer(tmp_path / "full", method)), rel=0.05)


@pytest.mark.parametrize("changes", [{"channels_last": True}, {"gradient_checkpointing": True},
                                     {"gradient_accumulation_steps": 2, "batch_size": 4}], ids=str)  # fmt: skip
def test_layouts_train_alike(changes, tmp_path):
    expected = take_steps(make_trainer(tmp_path / "plain"))
    assert take_steps(make_trainer(tmp_path / "other", **changes)) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("method", ["cd", "scd"])
def test_compiled_runs_train_alike(method, tmp_path):
    changes = {"derivative": "finite_difference"} if method == "scd" else {}
    expected = take_steps(make_trainer(tmp_path / "plain", method, **changes))
    torch._dynamo.reset()
    compiled = make_trainer(tmp_path / "compiled", method, compile=True, **changes)
    assert take_steps(compiled, free=compiled.total_steps - 1) == pytest.approx(expected, rel=5e-3)


def test_the_scaler_leaves_out_steps_that_overflow(tmp_path):
    trainer = make_trainer(tmp_path, mixed_precision="fp16", conversion_steps=0)
    trainer.accelerator.scaler._init_scale = 2.0**40  # beyond what fp16 holds
    before, batches = weights(trainer.unet), iter(trainer.batches)
    trainer.watch.after(trainer.advance(trainer.phases[-1], batches))
    trainer.watch.settle()
    assert trainer.watch.skipped == 1 and torch.equal(weights(trainer.unet), before)


def test_student_and_target_share_their_dropout_mask():
    network, images = build_unet(sample_size=16, dropout=0.5).train().to(GPU), IMAGES[:4].to(GPU)
    time = torch.full((4,), 500.0, device=GPU)
    with torch.no_grad(), same_dropout(network, GPU):
        first = network(images, time).sample
    with torch.no_grad():
        second, third = network(images, time).sample, network(images, time).sample
    assert torch.equal(first, second) and not torch.equal(second, third)


@pytest.mark.parametrize("precision", ["no", *HALF])
@pytest.mark.parametrize("method", ["cd", "tcm", "scd"])
def test_a_run_resumes_to_the_same_bits(method, precision, tmp_path):
    settings = {"mixed_precision": precision, "checkpoint_steps": 3, "checkpoint_limit": 9}
    whole = make_trainer(tmp_path / "whole", method, **settings)
    whole.train()
    part = make_trainer(tmp_path / "part", method, **settings)
    take_steps(part, until=3)
    part.watch.settle()
    part.save_checkpoint()
    resumed = make_trainer(tmp_path / "part", method, **settings, resume="auto")
    resumed.train()
    for name, network in whole.memory.networks.items():
        assert torch.equal(weights(network), weights(resumed.memory.networks[name])), name


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "1"]


@pytest.mark.parametrize("launcher", [TORCHRUN, launch("fsdp2", "--num_processes", "1")], ids=["ddp", "fsdp2"])
def test_launched_runs_train_like_others(launcher, tmp_path):
    settings = {**WHOLE, "allow_tf32": False}
    run(tmp_path / "one", **settings)
    run(tmp_path / "launched", **settings, launcher=launcher)
    assert_same_training(tmp_path / "launched", tmp_path / "one")


@pytest.mark.parametrize("changes", [{}, {"gradient_checkpointing": True}, {"mixed_precision": "bf16"}], ids=str)
def test_the_doctor_knows_the_peak_of_memory(changes, tmp_path):
    teacher = build_unet(sample_size=32, block_out_channels=(64, 64), down_block_types=("DownBlock2D",) * 2,
                         up_block_types=("UpBlock2D",) * 2), diffusers.DDPMScheduler()  # fmt: skip
    AcceleratorState._reset_state(reset_partial_state=True)
    torch.cuda.empty_cache()
    there = torch.cuda.memory_allocated()
    config = ConsistencyConfig(
        method="cd", distance="pseudo_huber", batch_size=64, conversion_steps=0, teacher_check=False, tracker="none",
        output_dir=str(tmp_path), **changes,
    )  # fmt: skip
    trainer = ConsistencyTrainer(config, teacher, torch.rand(64, 3, 32, 32) * 2 - 1)
    batches = iter(trainer.batches)
    torch.cuda.reset_peak_memory_stats()
    for _ in range(3):
        trainer.watch.after(trainer.advance(trainer.phases[-1], batches))
    peak = torch.cuda.max_memory_allocated() - there
    held = measure_footprint(trainer)[0].total
    assert 0.8 * held < peak < WORKING_SPACE * held + GPU_WORKSPACE


def test_the_doctor_examines_a_run(tmp_path):
    config = ConsistencyConfig(method="ect", batch_size=8, max_train_steps=4, output_dir=str(tmp_path))
    found = examine(config, (build_unet(sample_size=16), diffusers.DDPMScheduler()), IMAGES)
    assert found.seconds_per_step and "cuda:0" in str(found) and "\npeak " in str(found)


# From text ----------------------------------------------------------------------------------------------------------

TEXT = {
    "full": {"w_min": 1.0, "w_max": 3.0}, "adapters": {"lora_rank": 2, "guidance_scale": 3.0, "learning_rate": 1e-3},
    "ecd": {"method": "ecd", "guidance_scale": 3.0, "caption_dropout": 0.1, "conversion_steps": 2},
}  # fmt: skip


def make_text_trainer(folder: Any, kind: str, device: torch.device = GPU, **changes: Any) -> ConsistencyTrainer:
    values = {
        "teacher": make_stable_diffusion(),
        "data": make_captioned(),
        "batch_size": 4,
        "conversion_steps": None,
        "method": "lcm",
    }
    return make_trainer(folder, device=device, **{**values, **TEXT[kind], **changes})


@pytest.mark.parametrize("kind", TEXT)
@pytest.mark.parametrize("make", [make_stable_diffusion, make_sdxl])
def test_text_runs_are_those_of_the_cpu(make, kind, tmp_path):
    losses = [
        take_steps(make_text_trainer(tmp_path / device.type, kind, device, teacher=make())) for device in (GPU, CPU)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=5e-3)


@pytest.mark.parametrize("half", [{}, {"mixed_precision": "fp16", "teacher_dtype": "float16"},
                                  {"mixed_precision": "bf16", "teacher_dtype": "bfloat16"}], ids=str)  # fmt: skip
@pytest.mark.parametrize("kind", TEXT)
def test_a_text_student_trains_from_a_cache_without_waiting_and_samples(kind, half, tmp_path):
    precompute(ConsistencyConfig(output_dir=str(tmp_path / "cache")), make_stable_diffusion(), make_captioned())
    settings = {"max_train_steps": 8, "dataset": str(tmp_path / "cache"), "data": None, **half}
    trainer = make_text_trainer(tmp_path / "run", kind, **settings)
    assert torch.tensor(take_steps(trainer, free=trainer.phases[-1].start + 4)).isfinite().all()
    student = trainer.text.ready(trainer.pipeline())
    student.set_progress_bar_config(disable=True)
    image = student("cat", num_inference_steps=2, guidance_scale=1.0, output_type="pt").images
    assert image.device.type == GPU.type and image.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_latents_are_those_of_lcm_scheduler(dtype):
    pipe = make_text_student().to(GPU, dtype)
    pipe.set_progress_bar_config(disable=True)
    stock = LCMScheduler.from_config(pipe.scheduler.to_lcm().config)
    found = []
    for scheduler in (ConsistencyScheduler.from_config(stock.config), stock):
        pipe.scheduler = scheduler
        found.append(
            pipe("a dog", num_inference_steps=4, guidance_scale=8.0, generator=torch.Generator(GPU).manual_seed(0),
                 output_type="latent", height=16, width=16).images
        )  # fmt: skip
    tolerance = 1e-5 if dtype == torch.float32 else 5e-3
    torch.testing.assert_close(found[0], found[1], rtol=tolerance, atol=tolerance)


# Sampling -----------------------------------------------------------------------------------------------------------


def make_pipeline() -> ConsistencyPipeline:
    scheduler = ConsistencyScheduler.from_teacher(diffusers.DDPMScheduler(prediction_type="v_prediction"))
    pipe = ConsistencyPipeline(build_unet(sample_size=16), scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sample(pipe: ConsistencyPipeline, steps: int, **arguments: Any) -> torch.Tensor:
    seeds = [torch.Generator().manual_seed(i) for i in range(4)]
    return pipe(4, num_inference_steps=steps, generator=seeds, output_type="pt", **arguments).images


@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.1), (torch.float16, 0.02)])
def test_images_of_a_seed_are_those_of_the_cpu(steps, dtype, tolerance):
    expected = sample(make_pipeline(), steps)
    with _tf32(False):
        found = sample(make_pipeline().to(GPU, dtype), steps)
    assert found.device.type == GPU.type
    assert (found.float().cpu() - expected).abs().mean() < tolerance


def test_compiled_networks_draw_the_same_images():
    pipe = make_pipeline().to(GPU)
    with _tf32(False):
        expected = sample(pipe, 2)
        pipe.unet.compile(mode="reduce-overhead")
        torch.testing.assert_close(sample(pipe, 2), expected, rtol=1e-3, atol=1e-3)


def test_differences_of_networks_are_derivatives_where_tf32_is_allowed():
    network, generator = build_unet(sample_size=16).eval().to(GPU), torch.Generator().manual_seed(0)
    sample, along = (torch.randn(4, 3, 16, 16, generator=generator).to(GPU) for _ in range(2))
    time, change = torch.linspace(0, 5, 4, device=GPU), torch.ones(4, device=GPU)
    with torch.no_grad():
        with _tf32(False):
            exact = forward_mode(network, sample, time, along, change)
        with _tf32(True):
            found = finite_difference(network, sample, time, along, change)
    assert (found - exact).norm() < 5e-3 * exact.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_edits_keep_what_is_known(dtype):
    pipe = ConsistencyInpaintPipeline.from_pipe(make_pipeline()).to(GPU, dtype)
    pipe.set_progress_bar_config(disable=True)
    image, mask = (IMAGES[:2] + 1) / 2, torch.zeros(2, 1, 16, 16)
    mask[..., 4:12, 4:12] = 1
    found = pipe(image, mask, num_inference_steps=4, output_type="pt").images.float().cpu()
    known = mask.expand_as(image) == 0
    torch.testing.assert_close(found[known], image[known], rtol=0, atol=1e-5 if dtype == torch.float32 else 1e-3)


def test_figures_are_those_of_the_cpu():
    features = torch.nn.Sequential(torch.nn.AvgPool2d(4), torch.nn.Flatten())
    pixels = ((IMAGES + 1) * 127.5).round().byte()
    found = []
    for device in (GPU, CPU):
        wrapped = Features(_Bytes(features).to(device), "means of patches")
        pipe = make_pipeline().to(device)
        with _tf32(False):
            evaluator = Evaluator(wrapped, Reference(pixels, "noise"), num_images=64, batch_size=32)
            found.append(evaluator.fid(student_sampler(pipe, 1)))
    assert found[0] == pytest.approx(found[1], rel=1e-3)


class _Bytes(torch.nn.Module):
    """Features of images as bytes."""

    def __init__(self, features: torch.nn.Module) -> None:
        super().__init__()
        self.features = features
        self.register_buffer("place", torch.zeros(()))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.features(images.float() / 255)


@contextlib.contextmanager
def _tf32(allowed: bool):
    """In convolutions and products, or not at all."""
    backends = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [backend.allow_tf32 for backend in backends]
    for backend in backends:
        backend.allow_tf32 = allowed
    yield
    for backend, was in zip(backends, before, strict=True):
        backend.allow_tf32 = was
