"""Students that make images of text on the Hub: their cards, and all that belongs to them."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import yaml
from hub_server import connected
from stable_diffusion import make_stable_diffusion
from text_students import make_captioned, make_text_student, save_text_student

from cm_diffusers.cli import main
from cm_diffusers.hub import push_to_hub, render_card
from cm_diffusers.pipelines.weights import DTYPE

LATENTS = "num_inference_steps=2, output_type='latent', generator=torch.Generator().manual_seed(0)).images"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The hub's address and state."""
    with connected(tmp_path / "hub", monkeypatch) as found:
        yield found


@pytest.fixture
def base(tmp_path):
    make_stable_diffusion().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def write_record(folder, teacher="me/sd"):
    record = {
        "method": "lcm", "choices": {"source": "teacher"}, "optimisation": {}, "conversion_steps": 0, "steps": 4,
        "images": 16, "skipped_steps": 0, "seconds": 1.0, "hardware": "CPU", "processes": 1, "precision": "no",
        "parameters": 7, "teacher": {"name": teacher, "scheduler": "DDIMScheduler", "license": "mit"},
        "dataset": {"name": "me/cats", "rows": 24}, "seed": 0, "versions": {}, "date": "2026-01-01",
    }  # fmt: skip
    (folder / "training.json").write_text(json.dumps(record))


def metadata(card):
    return yaml.safe_load(str(card).split("---")[1])


def snippets(card):
    """The code of a card, which is seen to be Python."""
    codes = [part.split("```")[0] for part in str(card).split("```python\n")[1:]]
    for code in codes:
        compile(code, "card", "exec")
    return codes


# Cards


def test_the_card_of_a_stock_student(tmp_path):
    card = render_card(save_text_student(tmp_path), "me/full")
    assert metadata(card)["pipeline_tag"] == "text-to-image"
    assert not {"lora", "base_model"} & {*metadata(card)["tags"], *metadata(card)}
    assert "makes images of 16 × 16 pixels of text" in str(card)
    stock, ours = snippets(card)
    call = 'image = pipe("a photo of a cat", num_inference_steps=4, guidance_scale=8.5).images[0]'
    assert 'DiffusionPipeline.from_pretrained("me/full")' in stock and call in stock
    assert 'load_pipeline("me/full")' in ours and call in ours
    assert "is told `guidance_scale`" in str(card)


def test_the_card_of_adapters_names_their_base(tmp_path):
    folder = save_text_student(tmp_path, "adapters")
    write_record(folder)
    card = render_card(folder, "me/lora")
    values = metadata(card)
    assert (values["base_model"], values["base_model_relation"]) == ("me/sd", "adapter")
    assert {"lora", "distillation"} <= set(values["tags"]) and values["license"] == "mit"
    assert "adapters (LoRA) of a [consistency model]" in str(card) and "distilled from `me/sd`" in str(card)
    stock, ours = snippets(card)
    assert f'DiffusionPipeline.from_pretrained("me/sd", {DTYPE}=torch.float32)' in stock
    assert 'load_lora_weights("me/lora")' in stock
    assert 'LCMScheduler.from_pretrained("me/lora", subfolder="scheduler")' in stock
    assert 'load_pipeline("me/lora", base="me/sd")' in ours and "guidance_scale=1.0" in ours


def test_a_base_that_is_not_on_the_hub_is_left_open(tmp_path):
    folder = save_text_student(tmp_path, "adapters")
    write_record(folder, "my-folder")
    card = render_card(folder, "me/lora")
    assert "base_model" not in metadata(card)
    assert all('"path/to/the/teacher"' in code for code in snippets(card))
    assert "Instead of `path/to/the/teacher`: the folder or Hub id of the teacher" in str(card)


@pytest.mark.parametrize("kind", ["untold", "adapters"])
def test_what_stock_schedulers_do_not_compute_is_said(tmp_path, kind):
    card = render_card(save_text_student(tmp_path, kind, boundary="euler"), "me/student")
    assert "no scheduler that computes this student (family `vp`, boundary `euler`)" in str(card)
    assert "LCMScheduler" not in str(card)
    assert ('UNet2DConditionModel.from_pretrained("me/student"' in str(card)) == (kind == "untold")


def test_the_card_of_half_precision_runs_as_it_is(tmp_path):
    from diffusers import DiffusionPipeline

    full, half = save_text_student(tmp_path / "full"), tmp_path / "half"
    pipe = DiffusionPipeline.from_pretrained(full, **{DTYPE: torch.float16})
    pipe.save_pretrained(half, variant="fp16")
    stock, ours = snippets(render_card(half, str(half)))
    assert f'{DTYPE}=torch.float32, variant="fp16"' in stock and "load_pipeline(" in ours
    found = []
    for code in (stock, ours):
        values = {}
        exec(code.replace("image = pipe(", "import torch\ntorch.manual_seed(0)\nimage = pipe("), values)
        found.append(np.asarray(values["image"], float))
    np.testing.assert_allclose(*found, atol=1)
    assert found[0].std() > 10


def test_the_hub_client_validates_them(hub, tmp_path):
    for kind in ("full", "adapters"):
        folder = save_text_student(tmp_path / kind, kind)
        write_record(folder)
        render_card(folder, "me/student").validate()


@pytest.mark.parametrize("kind", ["full", "adapters"])
def test_an_evaluation_is_shown_while_it_is_of_these_weights(tmp_path, base, monkeypatch, kind):
    monkeypatch.setenv("CM_DIFFUSERS_CACHE", str(tmp_path / "cache"))
    folder = save_text_student(tmp_path / "student", kind)
    make_captioned().save_to_disk(tmp_path / "cats")
    main([
        "evaluate", str(folder), "--dataset", str(tmp_path / "cats"), "--features", "text_students:Corners",
        "--num_images", "4", "--nfes", "1", "--output_dir", str(folder / "evaluation"),
        *(["--base", str(base)] if kind == "adapters" else []),
    ])  # fmt: skip
    report = folder / "evaluation" / "report.json"
    report.write_text(report.read_text().replace('"fid"', '"clip_score"'))
    card = render_card(folder, "me/student")
    (model,) = metadata(card)["model-index"]
    names = {metric["name"] for result in model["results"] for metric in result["metrics"]}
    assert "CLIP score, 1 NFE" in names and model["results"][0]["task"]["type"] == "text-to-image"
    assert "prompts: 4 of the captions of cats/train" in str(card)
    other = make_text_student(kind)
    with torch.no_grad():
        for weight in other.unet.parameters():
            weight.add_(0.1)
    from cm_diffusers.training.saving import save_student

    save_student(other, folder)
    assert "## Evaluation" not in str(render_card(folder, "me/student"))


# The Hub


def load_elsewhere(code, endpoint, home):
    """The output of code in a process that knows nothing but the hub."""
    env = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(home)}
    for name in ("HF_HUB_OFFLINE", "HF_TOKEN"):
        env.pop(name, None)
    result = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return float(result.stdout.strip().splitlines()[-1])


def drawn(load, guidance):
    """Code that loads a pipeline, and draws."""
    lines = "import torch", *load, f"found = pipe('a dog', guidance_scale={guidance}, {LATENTS}"
    return "\n".join([*lines, "print(float(found.double().abs().sum()))"])


@pytest.mark.parametrize("kind", ["full", "adapters"])
def test_a_student_comes_back_with_our_classes_and_without(hub, tmp_path, base, kind):
    endpoint, state = hub
    address = push_to_hub(save_text_student(tmp_path / "student", kind), "me/student")
    assert address.startswith(f"{endpoint}/me/student/commit/")
    of_base = f", base={str(base)!r}" if kind == "adapters" else ""
    ours = ["from cm_diffusers import load_pipeline", f"pipe = load_pipeline('me/student'{of_base})"]
    stock = [
        "import sys",
        "sys.modules['cm_diffusers'] = None",
        "from diffusers import DiffusionPipeline, LCMScheduler",
    ]
    if kind == "adapters":
        stock += [
            f"pipe = DiffusionPipeline.from_pretrained({str(base)!r})", "pipe.load_lora_weights('me/student')",
            "pipe.scheduler = LCMScheduler.from_pretrained('me/student', subfolder='scheduler')",
        ]  # fmt: skip
    else:
        stock += ["pipe = DiffusionPipeline.from_pretrained('me/student')"]
    guidance = 8.5 if kind == "full" else 1.0
    pipe = make_text_student(kind)
    found = pipe(
        "a dog", guidance_scale=guidance, num_inference_steps=2, output_type="latent",
        generator=torch.Generator().manual_seed(0),
    ).images  # fmt: skip
    expected = pytest.approx(float(found.double().abs().sum()), rel=1e-4)
    assert load_elsewhere(drawn(ours, guidance), endpoint, tmp_path / "a") == expected
    assert load_elsewhere(drawn(stock, guidance), endpoint, tmp_path / "b") == expected


def test_all_parts_are_published_and_no_place_of_this_machine(hub, tmp_path, base):
    from diffusers import DiffusionPipeline

    from cm_diffusers import ConsistencyScheduler
    from cm_diffusers.training.saving import save_student

    _, state = hub
    pipe, folder = DiffusionPipeline.from_pretrained(base), tmp_path / "student"
    pipe.scheduler = ConsistencyScheduler.from_teacher(
        pipe.scheduler, boundary="lcm", clip_denoised=False, original_inference_steps=50
    )
    folder.mkdir()
    save_student(pipe, folder)
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "secret.safetensors").write_bytes(b"not to be published")
    tokenizer = folder / "tokenizer" / "tokenizer_config.json"
    tokenizer.write_text(json.dumps({**json.loads(tokenizer.read_text()), "name_or_path": str(base / "tokenizer")}))
    assert str(base) in (folder / "vae" / "config.json").read_text()
    push_to_hub(folder, "me/student")
    published = [path for path in (state.root / "me/student").rglob("*") if path.is_file()]
    assert {str(path.relative_to(state.root / "me/student")) for path in published} == {
        "README.md", "model_index.json", "scheduler/scheduler_config.json",
        *(f"unet/{name}" for name in ("config.json", "diffusion_pytorch_model.safetensors")),
        *(f"vae/{name}" for name in ("config.json", "diffusion_pytorch_model.safetensors")),
        *(f"text_encoder/{name}" for name in ("config.json", "model.safetensors")),
        *(f"tokenizer/{path.name}" for path in (folder / "tokenizer").iterdir()),
    }  # fmt: skip
    for path in published:
        assert str(tmp_path).encode() not in path.read_bytes(), path


def test_adapters_are_published_alone(hub, tmp_path):
    _, state = hub
    folder = save_text_student(tmp_path / "student", "adapters")
    write_record(folder)
    push_to_hub(folder, "me/lora")
    published = {path.name for path in (state.root / "me/lora").rglob("*") if path.is_file()}
    assert published == {
        "README.md", "training.json", "pytorch_lora_weights.safetensors", "scheduler_config.json",
    }  # fmt: skip


def test_the_command_shows_their_card(tmp_path, capsys):
    folder = save_text_student(tmp_path, "adapters")
    main(["push", str(folder), "me/lora", "--dry_run"])
    assert "load_lora_weights" in capsys.readouterr().out
