"""Loading by Hub id, from a real HTTP server on loopback, in processes of their own."""

import os
import subprocess
import sys

import diffusers
import pytest
import torch
from conftest import build_unet
from hub_server import serve
from stable_diffusion import make_stable_diffusion
from text_students import make_text_student, save_text_student

from cm_diffusers import ConsistencyPipeline, ConsistencyScheduler
from cm_diffusers.schedulers import ScaledTimeEDMScheduler


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    root = tmp_path_factory.mktemp("hub")
    vp = ConsistencyScheduler.from_teacher(diffusers.DDPMScheduler(prediction_type="v_prediction"))
    ConsistencyPipeline(build_unet(), vp).save_pretrained(root / "me" / "ours")
    ConsistencyPipeline(build_unet(), ConsistencyScheduler()).save_pretrained(root / "me" / "stock")
    diffusers.DDPMPipeline(build_unet(), diffusers.DDPMScheduler()).save_pretrained(root / "me" / "teacher")
    scaled = diffusers.ConsistencyModelPipeline(build_unet(), ScaledTimeEDMScheduler())
    scaled.save_pretrained(root / "me" / "imported")
    make_stable_diffusion().to(dtype=torch.float16).save_pretrained(root / "me" / "half", variant="fp16")
    save_text_student(root / "me" / "adapters", "adapters")
    make_text_student("untold").to(dtype=torch.float16).save_pretrained(root / "me" / "half-student", variant="fp16")
    with serve(root) as endpoint:
        yield endpoint


def run(code, endpoint, home):
    environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(home)}
    environment.pop("HF_HUB_OFFLINE", None)
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)


@pytest.mark.parametrize(("repo", "family"), [("me/ours", "vp"), ("me/stock", "consistency")])
def test_our_class_loads_by_id(hub, tmp_path, repo, family):
    code = (
        f"from cm_diffusers import ConsistencyPipeline as P\np = P.from_pretrained({repo!r})\n"
        "print(p.scheduler.config.family, p(output_type='np').images.shape)"
    )
    result = run(code, hub, tmp_path)
    assert result.stdout.strip() == f"{family} (1, 8, 8, 3)", result.stderr


def test_stock_diffusers_loads_by_id_what_it_can_represent(hub, tmp_path):
    code = (
        "import sys\nsys.modules['cm_diffusers'] = None\n"
        "from diffusers import DiffusionPipeline\nprint(type(DiffusionPipeline.from_pretrained('me/stock')).__name__)"
    )
    result = run(code, hub, tmp_path)
    assert result.stdout.strip() == "ConsistencyModelPipeline", result.stderr


@pytest.mark.parametrize(
    ("repo", "field", "value"), [("me/teacher", "prediction_type", "epsilon"), ("me/imported", "time_scale", "1000.0")]
)
def test_a_teacher_loads_by_id(hub, tmp_path, repo, field, value):
    code = (
        "from cm_diffusers.training.teacher import load_teacher\n"
        f"print(load_teacher({repo!r}).preconditioning.{field})"
    )
    result = run(code, hub, tmp_path)
    assert result.stdout.strip() == value, result.stderr


@pytest.mark.parametrize(
    "load",
    [
        "from cm_diffusers.training.teacher import load_teacher\np = load_teacher('me/half').text.pipeline",
        "from cm_diffusers import load_pipeline\np = load_pipeline('me/adapters', base='me/half')",
        "from cm_diffusers import load_pipeline\np = load_pipeline('me/half-student')",
    ],
    ids=["teacher", "base", "student"],
)
def test_weights_in_fp16_are_taken_where_there_are_no_others(hub, tmp_path, load):
    result = run(f"{load}\nprint(p.unet.dtype, p.text_encoder.dtype, p.vae.dtype)", hub, tmp_path)
    assert result.stdout.split() == 3 * ["torch.float32"], result.stderr
    assert "torch_dtype" not in result.stderr  # a name that diffusers warns of


def test_a_missing_repository_is_a_clear_error(hub, tmp_path):
    result = run("from cm_diffusers import ConsistencyPipeline as P\nP.from_pretrained('me/absent')", hub, tmp_path)
    assert result.returncode != 0
    assert "me/absent" in result.stderr.splitlines()[-1] or "me/absent" in result.stderr
