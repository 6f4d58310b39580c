"""Files from strangers are data: whatever they ask for, nothing of them is run."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from conftest import build_unet
from diffusers import DDPMPipeline, DDPMScheduler

from cm_diffusers import ConsistencyConfig, ConsistencyInpaintPipeline, ConsistencyPipeline, ConsistencyScheduler
from cm_diffusers.cli import main
from cm_diffusers.training.data import load_image_dataset
from cm_diffusers.training.record import teacher_license
from cm_diffusers.training.teacher import load_teacher

LOADERS = [ConsistencyPipeline.from_pretrained, ConsistencyInpaintPipeline.from_pretrained, load_teacher]


class Payload:
    """Unpickles as a call of the shell."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return os.system, (f"touch '{self.marker}'",)


@pytest.fixture
def marker(tmp_path) -> Path:
    """A file that exists when something has been run."""
    return tmp_path / "executed"


@pytest.fixture
def models(tmp_path) -> dict[Callable, Path]:
    """For each loader a folder that it reads."""
    student = ConsistencyPipeline(build_unet(), ConsistencyScheduler.from_teacher(DDPMScheduler()))
    student.save_pretrained(tmp_path / "student")
    DDPMPipeline(build_unet(), DDPMScheduler()).save_pretrained(tmp_path / "teacher")
    return {loader: tmp_path / ("teacher" if loader is load_teacher else "student") for loader in LOADERS}


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("zipped", [True, False])
def test_weights_with_code(loader, zipped, models, marker):
    folder = models[loader] / "unet"
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    hostile = {"conv_in.weight": Payload(marker)}
    weights = folder / "diffusion_pytorch_model.bin"
    torch.save(hostile, weights) if zipped else weights.write_bytes(pickle.dumps(hostile))
    with pytest.raises((OSError, ValueError, pickle.UnpicklingError)):
        loader(models[loader])
    assert not marker.exists()
    pickle.loads(pickle.dumps(hostile))
    assert marker.exists(), "the attack works where pickles are loaded as usual"


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("component", ["unet", "scheduler", "_class_name"])
def test_classes_that_come_with_the_files(loader, component, models, marker, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # nothing is imported from the working folder, either
    folder, code = models[loader], f"open({str(marker)!r}, 'w').close()\n\nclass Evil:\n    pass\n"
    for place in (folder / "evil.py", folder / "pipeline.py", tmp_path / "evil.py"):
        place.write_text(code)
    for part in ("unet", "scheduler"):
        (folder / part / "evil.py").write_text(code)
    index = json.loads((folder / "model_index.json").read_text())
    index[component] = ["evil", "Evil"]
    (folder / "model_index.json").write_text(json.dumps(index))
    with pytest.raises((OSError, ValueError, AttributeError, ImportError)):
        loader(folder)
    assert not marker.exists()


@pytest.mark.parametrize("tag", ["!!python/object/apply:os.system", "!!python/object/new:os.system"])
def test_yaml_with_tags(tag, marker, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(f"output_dir: {tag} [\"touch '{marker}'\"]\n")
    with pytest.raises(ValueError):
        ConsistencyConfig.from_yaml(path)
    with pytest.raises(SystemExit, match="error"):
        main(["distill", "--config", str(path)])
    with pytest.raises(SystemExit, match="error"):
        main(["distill", "--num_levels", f"{tag} [\"touch '{marker}'\"]"])
    assert not marker.exists()
    yaml.unsafe_load(path.read_text())
    assert marker.exists(), "the attack works where YAML is loaded without care"


def test_a_card_with_script(marker, models):
    folder = models[load_teacher]
    script = f"<script>alert(1)</script>\n```python\nopen({str(marker)!r}, 'w')\n```\n"
    (folder / "README.md").write_text(
        f"---\nlicense: !!python/object/apply:os.system [\"touch '{marker}'\"]\n---\n{script}"
    )
    assert teacher_license(str(folder)) is None
    load_teacher(folder)
    assert not marker.exists()


def test_a_licence_that_is_more_than_a_name(models):
    folder = models[load_teacher]
    (folder / "README.md").write_text("---\nlicense: '<script>alert(1)</script>'\n---\n")
    assert teacher_license(str(folder)) is None


def test_a_dataset_with_a_script(marker, tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    (folder / "pictures.py").write_text(f"open({str(marker)!r}, 'w').close()\n")
    with pytest.raises((ValueError, RuntimeError, OSError)):
        load_image_dataset(str(folder))
    assert not marker.exists()
