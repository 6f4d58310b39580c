from __future__ import annotations

from pathlib import Path

import nvlabs
import pytest
import torch
from diffusers import ConsistencyModelPipeline, EDMEulerScheduler
from openai_unet import OpenAIUNet, consistency_function, edm_denoiser, randomise

from cm_diffusers import ConsistencyPipeline
from cm_diffusers.cli import main
from cm_diffusers.importing import import_checkpoint, published
from cm_diffusers.importing.openai import PUBLISHED_TRAITS
from cm_diffusers.preconditioning import Denoiser
from cm_diffusers.schedulers import ScaledTimeEDMScheduler
from cm_diffusers.training.student import make_student
from cm_diffusers.training.teacher import load_teacher

TRAITS = {"image_size": 8, "attention_head_dim": 16, "qkv_order": "new"}
SIGMAS = torch.tensor([0.002, 0.3, 5.0, 80.0])
LABELS = {None: None, 5: torch.tensor([0, 4, 2, 1])}


def make_source(num_classes: int | None) -> OpenAIUNet:
    source = randomise(OpenAIUNet(num_classes=num_classes))
    assert isinstance(source, OpenAIUNet)
    return source


def save(source: OpenAIUNet, path: Path) -> Path:
    torch.save(source.state_dict(), path)
    return path


def states() -> torch.Tensor:
    """One state at each of `SIGMAS`, as large as states are there."""
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    return x * (0.25 + SIGMAS[:, None, None, None] ** 2).sqrt()


def assert_equal(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert float((found - expected).abs().max()) < 1e-5


# Consistency models -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_classes", LABELS)
@pytest.mark.parametrize("name", ["cd_x.pt", "ct_x.pt"])
def test_consistency_function_equals_the_sources(name: str, num_classes, tmp_path) -> None:
    source, labels = make_source(num_classes), LABELS[num_classes]
    pipeline = import_checkpoint(save(source, tmp_path / name), num_train_timesteps=40, **TRAITS)
    f = Denoiser(pipeline.unet, pipeline.scheduler.boundary)
    with torch.no_grad():
        assert_equal(f(states(), SIGMAS, class_labels=labels), consistency_function(source, states(), SIGMAS, labels))


@pytest.mark.parametrize("num_classes", LABELS)
def test_one_step_images_equal_the_sources(num_classes, tmp_path) -> None:
    source, labels = make_source(num_classes), LABELS[num_classes]
    pipeline = import_checkpoint(save(source, tmp_path / "cd_x.pt"), num_train_timesteps=40, **TRAITS)
    noise = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    images = pipeline(4, labels, latents=noise, output_type="pt").images
    expected = consistency_function(source, 80 * noise, torch.full((4,), 80.0), labels).clamp(-1, 1)
    assert_equal(images, expected / 2 + 0.5)


@pytest.mark.parametrize("num_classes", LABELS)
def test_stock_diffusers_draws_the_same_from_the_saved_pipeline(num_classes, tmp_path) -> None:
    labels = LABELS[num_classes]
    path = save(make_source(num_classes), tmp_path / "ct_x.pt")
    pipeline = import_checkpoint(path, num_train_timesteps=40, **TRAITS)
    pipeline.save_pretrained(tmp_path / "saved")
    stock = ConsistencyModelPipeline.from_pretrained(tmp_path / "saved")
    again = ConsistencyPipeline.from_pretrained(tmp_path / "saved")
    for steps in ({"num_inference_steps": 1}, {"num_inference_steps": 4}, {"timesteps": [22, 0]}):
        first, *others = (
            pipe(4, labels, **{"num_inference_steps": None, **steps}, output_type="np",
                 generator=torch.Generator().manual_seed(7)).images
            for pipe in (pipeline, stock, again)
        )  # fmt: skip
        assert all((first == other).all() for other in others)


@pytest.fixture
def published_weights(monkeypatch):
    """Stands for reading a published file: weights of its shapes, without values."""

    def stand_in(path: Path) -> dict[str, torch.Tensor]:
        size = 64 if "imagenet64" in Path(path).name else 256
        architecture = next(key for key, traits in PUBLISHED_TRAITS.items() if traits.image_size == size)
        with torch.device("meta"):
            return OpenAIUNet(
                architecture.widths, architecture.num_blocks, architecture.attention, film=size == 64,
                num_classes=1000 if size == 64 else None,
            ).state_dict()  # fmt: skip

    monkeypatch.setattr(published, "load_state_dict", stand_in)


# Noise levels of the second step as the literature gives them.
@pytest.mark.parametrize(
    ("name", "size", "levels", "second"),
    [
        ("cd_imagenet64_l2", 64, 40, 1.382),
        ("cd_imagenet64_lpips", 64, 40, 1.382),
        ("ct_imagenet64", 64, 201, 1.913),
        ("cd_bedroom256_lpips", 256, 40, 4.366),
        ("ct_bedroom256", 256, 151, 3.991),
        ("cd_cat256_l2", 256, 40, None),
    ],
)
def test_published_models_need_no_options(name, size, levels, second, published_weights) -> None:
    pipeline = import_checkpoint(f"{name}.pt")
    unet, scheduler = pipeline.unet.config, pipeline.scheduler.config
    assert (unet.sample_size, unet.attention_head_dim) == (size, 64)
    assert unet.num_class_embeds == (1000 if size == 64 else None)
    assert unet.resnet_time_scale_shift == ("scale_shift" if size == 64 else "default")
    assert (scheduler.num_train_timesteps, pipeline.scheduler.is_stock) == (levels, True)
    if second is None:
        assert scheduler.few_step_sigmas is None
    else:
        assert scheduler.few_step_sigmas["2"] == [80.0, pytest.approx(second, abs=5e-4)]


def test_published_teacher_needs_no_options(published_weights) -> None:
    pipeline = import_checkpoint("edm_bedroom256_ema.pt")
    assert pipeline.unet.config.sample_size == 256
    assert type(pipeline.scheduler) is ScaledTimeEDMScheduler


# Teachers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_classes", LABELS)
def test_teacher_of_openai_denoises_as_the_source(num_classes, tmp_path) -> None:
    source, labels = make_source(num_classes), LABELS[num_classes]
    pipeline = import_checkpoint(save(source, tmp_path / "edm_x.pt"), **TRAITS)
    pipeline.save_pretrained(tmp_path / "teacher")
    expected = edm_denoiser(source, states(), SIGMAS, labels)
    with torch.no_grad():
        for teacher in (load_teacher(pipeline), load_teacher(tmp_path / "teacher")):
            assert_equal(teacher.denoiser(states(), SIGMAS, class_labels=labels), expected)


def test_student_of_openais_teacher_starts_as_theirs_did(tmp_path) -> None:
    source = make_source(None)
    teacher = load_teacher(import_checkpoint(save(source, tmp_path / "edm_x.pt"), **TRAITS))
    student, scheduler = make_student(teacher.unet, teacher.scheduler, convert=True)
    assert scheduler.is_stock
    with torch.no_grad():
        f = Denoiser(student, scheduler.boundary)(states(), SIGMAS)
    assert_equal(f, consistency_function(source, states(), SIGMAS))


def test_teacher_of_nvlabs_denoises_as_the_source(tmp_path) -> None:
    source, labels = nvlabs.build(label_dim=5), LABELS[5]
    pipeline = import_checkpoint(nvlabs.write_pickle(tmp_path / "edm-x.pkl", source))
    assert type(pipeline.scheduler) is EDMEulerScheduler
    pipeline.save_pretrained(tmp_path / "teacher")
    expected = source(states(), SIGMAS, torch.eye(5)[labels])
    with torch.no_grad():
        assert_equal(load_teacher(tmp_path / "teacher").denoiser(states(), SIGMAS, class_labels=labels), expected)


def test_teachers_sample_by_euler_steps(tmp_path) -> None:
    source = make_source(5)
    pipeline = import_checkpoint(save(source, tmp_path / "edm_x.pt"), **TRAITS)
    noise = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    images = pipeline(4, LABELS[5], 3, latents=noise, output_type="pt").images
    sigmas = [*((80 ** (1 / 7) + t * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7 for t in (0, 0.5, 1)), 0.0]
    x = noise * (80**2 + 1) ** 0.5
    for sigma, lower in zip(sigmas, sigmas[1:], strict=False):
        x = x + (lower - sigma) / sigma * (x - edm_denoiser(source, x, torch.full((4,), sigma), LABELS[5]))
    torch.testing.assert_close(images, (x / 2 + 0.5).clamp(0, 1), atol=1e-3, rtol=0)


# Options ------------------------------------------------------------------------------------------------------------


def test_kind_comes_before_the_name(tmp_path) -> None:
    path = save(make_source(None), tmp_path / "cd_x.pt")
    assert type(import_checkpoint(path, kind="edm", **TRAITS).scheduler) is ScaledTimeEDMScheduler


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("model.pt", {}, "does not begin with cd_, ct_ or edm_: say by `kind`"),
        ("model.pt", {"kind": "gan"}, "`kind` must be one of cd, ct, edm, got 'gan'"),
        ("cd_x.pt", TRAITS, "cd_x is none of the published cd models .*`num_train_timesteps`.* is needed"),
        ("edm_x.pt", {}, "`image_size`, `attention_head_dim`, `qkv_order` must be given"),
        ("edm_x.pt", {"image_size": 8, "qkv_order": "new"}, "no published model's: `attention_head_dim` must"),
        ("edm_x.pt", {"num_train_timesteps": 40}, "`num_train_timesteps` cannot be given"),
        ("edm-x.pkl", {"kind": "edm", "image_size": 8}, "`kind`, `image_size` cannot be given"),
    ],
)
def test_options_that_are_missing_or_wrong_are_named(name: str, options: dict, message: str, tmp_path) -> None:
    with pytest.raises(ValueError, match=message):
        import_checkpoint(save(make_source(None), tmp_path / name), **options)


def test_command_writes_a_pipeline(tmp_path, capsys) -> None:
    path, folder = save(make_source(None), tmp_path / "checkpoint.pt"), tmp_path / "student"
    options = "--kind cd --image_size 8 --attention_head_dim 16 --qkv_order new --num_train_timesteps 9".split()
    main(["import", str(path), str(folder), *options])
    assert f"cm-diffusers sample {folder}" in capsys.readouterr().out
    assert ConsistencyModelPipeline.from_pretrained(folder).scheduler.config.num_train_timesteps == 9


def test_command_writes_a_teacher(tmp_path, capsys) -> None:
    path = nvlabs.write_pickle(tmp_path / "edm-x.pkl", nvlabs.build())
    main(["import", str(path), str(tmp_path / "teacher")])
    assert f"cm-diffusers distill --teacher {tmp_path / 'teacher'}" in capsys.readouterr().out
    assert load_teacher(tmp_path / "teacher").unet.config.sample_size == 8


def test_command_reports_errors_in_one_line(tmp_path) -> None:
    with pytest.raises(SystemExit, match="^cm-diffusers import: error: .*`kind`"):
        main(["import", str(save(make_source(None), tmp_path / "x.pt")), str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_command_explains_every_option(capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["import", "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    options = ("--kind", "--image_size", "--attention_head_dim", "--qkv_order", "--num_train_timesteps")
    assert all(option in text for option in options)
