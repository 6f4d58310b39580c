import json
import shlex
import subprocess
import sys
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from conftest import build_unet
from PIL import Image
from stable_diffusion import make_stable_diffusion

from cm_diffusers import ConsistencyConfig, ConsistencyPipeline, ConsistencyScheduler
from cm_diffusers.cli import main
from cm_diffusers.commands.options import choose_device
from cm_diffusers.commands.training import parse_config

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """A teacher and a folder of images on disk."""
    folder = tmp_path_factory.mktemp("cli")
    diffusers.DDPMPipeline(build_unet(), diffusers.DDPMScheduler()).save_pretrained(folder / "teacher")
    (folder / "images").mkdir()
    for index, pixels in enumerate(np.random.default_rng(0).integers(0, 256, (12, 10, 10, 3), dtype=np.uint8)):
        Image.fromarray(pixels).save(folder / "images" / f"{index}.png")
    (folder / "config.yaml").write_text(
        f"teacher: {folder / 'teacher'}\ndataset: {folder / 'images'}\nteacher_check: false\ndistance: l2\n"
        "num_levels: 4\nmax_train_steps: 2\nconversion_steps: 1\nbatch_size: 4\ntracker: none\nsample_steps: 0\n"
    )
    return folder


def test_distill_then_sample(workspace, tmp_path, capsys):
    student = tmp_path / "student"
    main(["distill", "--config", str(workspace / "config.yaml"), "--output_dir", str(student), "--learning_rate=1e-3"])
    assert "cm-diffusers sample" in capsys.readouterr().out
    samples = tmp_path / "samples"
    sample = ["sample", str(student), "--device", "cpu"]
    main([*sample, "--num_images", "5", "--batch_size", "2", "--output_dir", str(samples)])
    assert sorted(path.name for path in samples.iterdir()) == [*(f"{i:05d}.png" for i in range(5)), "grid.png"]
    assert Image.open(samples / "00000.png").size == (8, 8)
    main([*sample, "--num_images", "1", "--seed", "3", "--output_dir", str(tmp_path / "one")])
    paths = tmp_path / "one" / "00000.png", samples / "00003.png"
    alone, in_batch = (np.asarray(Image.open(path), dtype=int) for path in paths)
    assert abs(alone - in_batch).max() <= 1


EDITS = {
    "inpaint": ["0.png", "1.png", "--mask", "mask.png", "--num_images", "2"], "colorize": ["0.png", "--steps", "2"],
    "superres": ["small.png", "--factor", "4"], "img2img": ["0.png", "--strength", "0.4"],
    "denoise": ["0.png", "1.png", "--noise_level", "0.1"], "interpolate": ["--num_frames", "3"],
}  # fmt: skip


@pytest.mark.parametrize("kind", EDITS)
def test_every_edit_leaves_its_results_and_a_grid(kind, workspace, tmp_path, monkeypatch):
    ConsistencyPipeline(build_unet(), ConsistencyScheduler()).save_pretrained(tmp_path / "student")
    monkeypatch.chdir(workspace / "images")
    Image.new("L", (10, 10)).save(tmp_path / "mask.png")
    Image.new("RGB", (2, 2)).save(tmp_path / "small.png")
    arguments = [str(tmp_path / word) if word in ("mask.png", "small.png") else word for word in EDITS[kind]]
    main(["edit", kind, str(tmp_path / "student"), *arguments, "--output_dir", str(tmp_path / "out")])
    count = {"inpaint": 4, "denoise": 2, "interpolate": 3}.get(kind, 1)
    results = sorted((tmp_path / "out").glob("*-0*.png"))
    assert len(results) == count and (tmp_path / "out" / "grid.png").exists()
    size = (10, 10) if kind == "denoise" else (8, 8)  # noise is not resized
    assert all(Image.open(path).size == size for path in results)
    if kind == "inpaint":  # all black: nothing is repainted
        expected = np.asarray(Image.open("1.png").resize((8, 8), Image.Resampling.BICUBIC), dtype=int)
        assert abs(np.asarray(Image.open(tmp_path / "out" / "1-01.png"), dtype=int) - expected).max() <= 2


def test_pictures_of_several_sizes_have_a_grid_each(tmp_path):
    ConsistencyPipeline(build_unet(), ConsistencyScheduler()).save_pretrained(tmp_path / "student")
    for name, size in (("a", (8, 8)), ("b", (16, 8)), ("c", (8, 8))):
        Image.new("RGB", size).save(tmp_path / f"{name}.png")
    files = [str(tmp_path / f"{name}.png") for name in "abc"]
    main(["edit", "denoise", str(tmp_path / "student"), *files, "--output_dir", str(tmp_path / "out")])
    assert {path.name for path in (tmp_path / "out").glob("grid*")} == {"grid-8x8.png", "grid-16x8.png"}
    assert Image.open(tmp_path / "out" / "b-00.png").size == (16, 8)
    with pytest.raises(SystemExit, match="different names"):
        main(["edit", "denoise", str(tmp_path / "student"), files[0], files[0]])


def test_a_walk_between_pictures_takes_a_teacher(workspace, tmp_path):
    ConsistencyPipeline(build_unet(), ConsistencyScheduler()).save_pretrained(tmp_path / "student")
    walk = ["edit", "interpolate", str(tmp_path / "student"), "--output_dir", str(tmp_path / "out"), "--images"]
    walk += [str(workspace / "images" / f"{index}.png") for index in (0, 1)]
    main([*walk, "--teacher", str(workspace / "teacher"), "--num_frames", "2"])
    assert len(list((tmp_path / "out").glob("frame-*.png"))) == 2
    assert Image.open(tmp_path / "out" / "grid.png").width > 4 * 8  # between the pictures
    with pytest.raises(SystemExit, match="edit: error: `image` and `teacher` go together"):
        main(walk)


def test_train_needs_no_teacher(workspace, tmp_path):
    build_unet().save_config(tmp_path / "unet")
    main(
        ["train", "--unet_config", str(tmp_path / "unet"), "--dataset", str(workspace / "images"), "--batch_size", "4",
         "--max_train_steps", "1", "--distance", "l2", "--tracker", "none", "--sample_steps", "0",
         "--output_dir", str(tmp_path / "out")]
    )  # fmt: skip
    assert (tmp_path / "out" / "model_index.json").exists()


def test_precompute_then_distill(tmp_path, capsys):
    make_stable_diffusion().save_pretrained(tmp_path / "sd")
    (tmp_path / "images").mkdir()
    with (tmp_path / "images" / "metadata.jsonl").open("w") as captions:
        for index, pixels in enumerate(np.random.default_rng(0).integers(0, 256, (6, 20, 20, 3), dtype=np.uint8)):
            Image.fromarray(pixels).save(tmp_path / "images" / f"{index}.png")
            captions.write(json.dumps({"file_name": f"{index}.png", "text": f"picture {index}"}) + "\n")
    teacher, cache = ["--teacher", str(tmp_path / "sd")], ["--output_dir", str(tmp_path / "a cache")]
    precompute = ["precompute", *teacher, "--dataset", str(tmp_path / "images"), *cache, "--resolution", "32"]
    main([*precompute, "--random_flip", "yes", "--seed=1", "--cache_dtype", "float16"])
    program, *train = shlex.split(capsys.readouterr().out.partition("Train on it with: ")[2])
    assert program == "cm-diffusers"
    with pytest.raises(SystemExit, match="precompute: error: The cache .* made from something else: .*seed was 1"):
        main([*precompute, "--random_flip", "yes", "--cache_dtype", "float16"])
    with pytest.raises(SystemExit, match="Unknown option 'sead'. Did you mean 'seed'"):
        main([*precompute, "--sead", "1"])
    main(
        [*train, "--method", "lcm", "--lora_rank", "2", "--batch_size", "2", "--max_train_steps", "1",
         "--teacher_check", "no", "--tracker", "none", "--output_dir", str(tmp_path / "out")]
    )  # fmt: skip
    assert (tmp_path / "out" / "pytorch_lora_weights.safetensors").exists()


def test_command_line_comes_before_the_file(workspace):
    arguments = ["--config", str(workspace / "config.yaml"), "--num_levels", "9", "--few_step_sigmas", "{2: [80, 1]}"]
    values = parse_config("distill", arguments, "cd")
    assert (values["num_levels"], values["batch_size"], values["few_step_sigmas"]) == (9, 4, {2: [80, 1]})


def test_none_switches_an_option_off():
    assert parse_config("distill", ["--max_grad_norm", "none", "--tracker", "none"], "cd") == {
        "method": "cd", "max_grad_norm": None, "tracker": "none",
    }  # fmt: skip


@pytest.mark.parametrize(
    "texts",
    [["a cat #1"], ["a cat: sleeping"], ['"quoted" word'], ["*.parquet"], ["[ab]*.png"], ["[a"], ["a, b"],
     ["a.tar", "b.tar"], ["[a, b]", "c"], ["none", "null"]],
)  # fmt: skip
@pytest.mark.parametrize("name", ["sample_prompts", "data_files", "lora_targets"])
def test_lists_of_text_are_taken_as_they_are_written(name, texts):
    values = parse_config("distill", [f"--{name}", *texts, "--num_levels", "9"], "cd")
    assert values == {"method": "cd", name: texts, "num_levels": 9}


@pytest.mark.parametrize(
    ("name", "written", "expected"),
    [
        ("data_files", ["[a, b]"], ["a", "b"]),
        ("sample_prompts", ["None"], None),
        ("dataset_split", ["train[:10] # all: of it"], "train[:10] # all: of it"),
        ("sample_nfes", ["1", "2"], [1, 2]),
        ("sample_nfes", ["1,2"], [1, 2]),
        ("sample_nfes", ["1,", "2"], [1, 2]),
        ("sample_nfes", ["[1, 2]"], [1, 2]),
        ("eval_nfes", ["4"], [4]),
        ("adam_betas", ["0", "9e-1"], [0.0, 0.9]),
    ],
)
def test_other_values_are_read(name, written, expected):
    values = parse_config("distill", [f"--{name}", *written], "cd")
    assert getattr(ConsistencyConfig(**values), name) == expected


def test_lists_in_a_file_are_yaml(tmp_path):
    (tmp_path / "c.yaml").write_text("data_files: a.tar  # alone\nsample_nfes: [1, 2]\nsample_prompts:\n- a cat\n")
    values = parse_config("distill", ["--config", str(tmp_path / "c.yaml")], "cd")
    assert values == {"method": "cd", "data_files": "a.tar", "sample_nfes": [1, 2], "sample_prompts": ["a cat"]}


@pytest.mark.parametrize("written", ["one", "{1: 2}", "[[1]]"])
def test_a_list_of_something_else_is_one_line(written):
    with pytest.raises(SystemExit, match="^cm-diffusers distill: error: `sample_nfes`"):
        main(["distill", "--sample_nfes", written])


def test_help_shows_how_lists_are_written(capsys):
    for command in ("distill", "precompute"):
        with pytest.raises(SystemExit):
            main([command, "--help"])
        text = " ".join(capsys.readouterr().out.split())
        assert "--data_files STR [STR ...]" in text and "--data_files '[a.tar, b.tar]'" in text


@pytest.mark.parametrize("option", ["--learning_rat=1", "--learning-rate=1"])
def test_unknown_option_is_refused_with_the_nearest(option):
    with pytest.raises(SystemExit, match="Did you mean 'learning_rate'"):
        parse_config("distill", [option], "cd")


def test_unknown_key_in_the_file_is_refused(tmp_path):
    (tmp_path / "c.yaml").write_text("batchsize: 3\n")
    with pytest.raises(SystemExit, match="Did you mean 'batch_size'"):
        main(["distill", "--config", str(tmp_path / "c.yaml")])


def test_errors_are_one_line_without_a_traceback(tmp_path):
    with pytest.raises(SystemExit, match="^cm-diffusers distill: error: .*needs a `teacher`"):
        main(["distill", "--output_dir", str(tmp_path), "--tracker", "none"])


@pytest.mark.parametrize("device", ["foo", "meta", "cuda:7", "cuda:", "cpu:1"])
@pytest.mark.parametrize("command", ["sample", "edit denoise", "demo"])
def test_a_device_that_is_not_there_is_one_line(command, device, tmp_path, monkeypatch):
    ConsistencyPipeline(build_unet(), ConsistencyScheduler()).save_pretrained(tmp_path)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    pictures = ["picture.png"] if command == "edit denoise" else []
    message = f"error: `--device` must be one of cpu, cuda, cuda:0, cuda:1 on this machine, got '{device}'"
    with pytest.raises(SystemExit, match=f"^cm-diffusers {command.split()[0]}: {message}"):
        main([*command.split(), str(tmp_path), *pictures, "--device", device])


def test_the_devices_of_a_machine_without_accelerator(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 0)
    assert [choose_device(name) for name in (None, "cpu", "cpu:0")] == ["cpu", "cpu", "cpu:0"]
    with pytest.raises(ValueError, match="must be one of cpu on this machine, got 'cuda'"):
        choose_device("cuda")


@pytest.mark.parametrize("command", ["distill", "train", "precompute", "sample", "evaluate", "timesteps"])
def test_help_explains_every_option(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    if command in ("distill", "train"):
        from cm_diffusers import ConsistencyConfig

        assert all(f"--{name}" in text for name in ConsistencyConfig.__dataclass_fields__)


def test_help_is_quick_to_import():
    """No torch is needed to say what the commands are."""
    code = "import sys, cm_diffusers.cli as c\ntry: c.main(['--help'])\n"
    code += "except SystemExit: pass\nprint('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip().endswith("False")


def test_the_example_for_accelerate_launch_runs(workspace, tmp_path):
    command = [sys.executable, str(EXAMPLES / "distill.py"), "--config", str(workspace / "config.yaml")]
    result = subprocess.run([*command, "--output_dir", str(tmp_path / "out")], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "out" / "unet" / "diffusion_pytorch_model.safetensors").exists()
