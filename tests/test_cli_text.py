"""Commands and students that make images of text."""

import numpy as np
import pytest
from conftest import build_unet
from PIL import Image
from stable_diffusion import make_stable_diffusion
from text_students import make_captioned, make_text_student, save_text_student

from cm_diffusers import ConsistencyPipeline, ConsistencyScheduler
from cm_diffusers.cli import main
from cm_diffusers.training.randomness import generators


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """Students with and without text, and a teacher."""
    folder = tmp_path_factory.mktemp("cli-text")
    save_text_student(folder / "full")
    save_text_student(folder / "untold", "untold")
    save_text_student(folder / "adapters", "adapters")
    make_stable_diffusion().save_pretrained(folder / "teacher")
    ConsistencyPipeline(build_unet(), ConsistencyScheduler()).save_pretrained(folder / "pixels")
    return folder


def sample(folder, out, *options):
    main(["sample", str(folder), "--device", "cpu", "--output_dir", str(out), *options])
    return [np.asarray(Image.open(path), dtype=int) for path in sorted(out.glob("0*.png"))]


@pytest.mark.parametrize("kind", ["full", "untold", "adapters"])
def test_image_i_is_of_prompt_i_and_seed_plus_i(shared, tmp_path, kind):
    base = ["--base", str(shared / "teacher")] if kind == "adapters" else []
    options = ["--prompts", "a cat", "the dog", "--num_images", "5", "--batch_size", "2", "--seed", "7", *base]
    images = sample(shared / kind, tmp_path, *options)
    assert len(images) == 5 and (tmp_path / "grid.png").exists()
    own = make_text_student(kind)(
        ["a cat", "the dog", "a cat"], num_inference_steps=1, guidance_scale=8.5 if kind == "full" else 1.0,
        generator=generators([7, 8, 9]), output_type="np",
    ).images  # fmt: skip
    for image, expected in zip(images, own, strict=False):
        assert abs(image - expected * 255).max() <= 1


def test_the_guidance_is_the_one_asked_for(shared, tmp_path):
    options = ["--prompts", "a cat", "--num_images", "1", "--steps", "2"]
    default, asked = sample(shared / "full", tmp_path / "a", *options), None
    asked = sample(shared / "full", tmp_path / "b", *options, "--guidance_scale", "8.5")
    other = sample(shared / "full", tmp_path / "c", *options, "--guidance_scale", "2")
    assert (default[0] == asked[0]).all() and (default[0] != other[0]).any()


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("full", [], "makes images of text.*`cm-diffusers sample --prompts`"),
        ("adapters", [], "makes images of text.*`cm-diffusers sample --prompts`"),
        ("adapters", ["--prompts", "a"], "holds adapters: pass `base`"),
        ("full", ["--prompts", "a", "--class_labels", "1"], "--class_labels and --sigmas are for students without"),
        ("full", ["--prompts", "a", "--sigmas", "3"], "--class_labels and --sigmas are for students without"),
        ("full", ["--prompts", "a", "--guidance_scale", "0"], "`guidance_scale` must be at least 1"),
        ("full", ["--prompts", "a", "--base", "teacher"], "`base` is for adapters"),
        ("pixels", ["--prompts", "a"], "makes no images of text: leave out --prompts"),
        ("pixels", ["--base", "teacher"], "--base is for adapters"),
        ("teacher", ["--prompts", "a"], "DDIMScheduler"),
        ("nothing", ["--prompts", "a"], "no pipeline, and there are no adapters"),
    ],
)
def test_what_does_not_go_together_is_one_line(shared, tmp_path, name, options, message):
    with pytest.raises(SystemExit, match=f"^cm-diffusers sample: error: .*{message}"):
        sample(shared / name, tmp_path, *options)


@pytest.mark.parametrize("kind", ["full", "adapters"])
@pytest.mark.parametrize("command", ["edit", "timesteps", "export", "demo"])
def test_what_such_students_cannot_do_is_one_line(shared, tmp_path, command, kind):
    student = str(shared / kind)
    arguments = {
        "edit": ["denoise", student, "picture.png"], "timesteps": [student, "--dataset", "images"],
        "export": [student, str(tmp_path)], "demo": [student],
    }[command]  # fmt: skip
    with pytest.raises(SystemExit, match=f"^cm-diffusers {command}: error: .*makes images of text"):
        main([command, *arguments])


def test_the_demo_shows_no_teacher_of_text_beside_a_student_without(shared):
    pytest.importorskip("gradio")
    with pytest.raises(SystemExit, match="demo: error: The teacher .* makes images of text, and the student does not"):
        main(["demo", str(shared / "pixels"), "--teacher", str(shared / "teacher")])


@pytest.mark.parametrize("adapters", [[], ["--lora_rank", "2", "--guidance_scale", "3"]], ids=["whole", "adapters"])
def test_a_run_says_how_its_student_is_sampled(adapters, shared, tmp_path, capsys):
    make_captioned().save_to_disk(tmp_path / "cats")
    main([
        "distill", "--method", "lcm", "--teacher", str(shared / "teacher"), "--dataset", str(tmp_path / "cats"),
        "--max_train_steps", "1", "--batch_size", "2", "--num_samples", "1", "--teacher_check", "false", "--tracker",
        "none", "--sample_steps", "0", "--output_dir", str(tmp_path / "run"), *adapters,
    ])  # fmt: skip
    base = ["--base", str(shared / "teacher")] if adapters else []
    told = ["sample", str(tmp_path / "run"), *base, "--prompts", "TEXT"]
    assert f"Sample with: cm-diffusers {' '.join(told)}\n" in capsys.readouterr().out
    main([*told, "--num_images", "1", "--output_dir", str(tmp_path / "images")])
    assert (tmp_path / "images" / "grid.png").exists()
