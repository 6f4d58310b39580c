"""The quickstart from end to end, with so little training that its figures mean nothing."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def quickstart():
    spec = importlib.util.spec_from_file_location("quickstart", EXAMPLES / "quickstart.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_quickstart_writes_its_picture_its_student_and_its_figures(quickstart, tmp_path, monkeypatch, capsys):
    config = (EXAMPLES / "configs" / "digits.yaml").read_text()
    short = "\nteacher_check: false\nmax_train_steps: 2\nconversion_steps: 1\nsample_steps: 0\n"
    kept = [line for line in config.splitlines() if line.split(":")[0] not in short]
    (tmp_path / "short.yaml").write_text("\n".join(kept) + short)
    monkeypatch.setattr(quickstart, "CONFIG", tmp_path / "short.yaml")
    monkeypatch.setattr(quickstart, "TEACHER_STEPS", 2)
    monkeypatch.setattr(quickstart, "NUM_SAMPLES", 70)
    monkeypatch.setattr(quickstart, "TEACHER_SAMPLERS", [("euler", 2), ("heun", 2)])
    monkeypatch.setattr(sys, "argv", ["quickstart.py", "--output_dir", str(tmp_path / "out"), "--seed", "1"])
    quickstart.main()

    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [row["nfe"] for row in results["teacher"]] == [2, 3]
    assert [row["nfe"] for row in results["student"]] == [1, 2]
    for row in results["teacher"] + results["student"]:
        assert row["fid"] > 0
        assert row["seconds_per_1000"] > 0
    assert results["seconds"] > 0
    assert (tmp_path / "out" / "samples.png").stat().st_size > 1000
    assert (tmp_path / "out" / "student" / "model_index.json").exists()
    assert "student" in capsys.readouterr().out


def test_real_digits_are_nearer_to_real_digits_than_noise_is(quickstart):
    import torch

    images, labels = quickstart.load_digits()
    assert images.shape == (1797, 1, 8, 8)
    features = quickstart.train_classifier(images, labels, steps=30)
    even, odd = features(images[::2]), features(images[1::2])
    noise = features(torch.rand(500, 1, 8, 8) * 2 - 1)
    assert quickstart.frechet_distance(even, odd) < 0.1 * quickstart.frechet_distance(noise, odd)
