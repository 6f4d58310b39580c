"""Evaluation within a run whose student makes images of text."""

import json

import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import build_unet
from diffusers import DDPMScheduler
from stable_diffusion import make_sdxl, make_stable_diffusion
from text_students import CAPTIONS, make_captioned, save_clip

from cm_diffusers import ConsistencyConfig, ConsistencyTrainer, load_pipeline
from cm_diffusers.evaluation import text_student_sampler
from cm_diffusers.evaluation.in_loop import read_history

SETTINGS = {
    "method": "lcm", "batch_size": 4, "max_train_steps": 4, "teacher_check": False, "tracker": "none",
    "sample_steps": 0, "checkpoint_steps": 0, "num_samples": 1, "learning_rate": 1e-2, "eval_steps": 2,
    "eval_features": "text_students:Corners", "eval_num_images": 6, "eval_nfes": [1, 2],
}  # fmt: skip


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CM_DIFFUSERS_CACHE", str(tmp_path / "cache"))


def make_trainer(folder, teacher=None, data=None, **changes):
    AcceleratorState._reset_state(reset_partial_state=True)
    config = ConsistencyConfig.from_dict({**SETTINGS, "output_dir": str(folder), **changes})
    data = make_captioned() if data is None else data
    return ConsistencyTrainer(config, teacher or make_stable_diffusion(), data)


@pytest.mark.parametrize("changes", [{}, {"lora_rank": 2}], ids=["full", "adapters"])
def test_students_of_text_are_measured_and_the_best_is_kept(tmp_path, changes):
    clip = save_clip(tmp_path / "tiny-clip", seed=3)
    make_trainer(tmp_path / "run", eval_clip=str(clip), **changes).train()
    history = read_history(tmp_path / "run" / "evaluation.jsonl")
    assert [(entry["step"], entry["nfe"]) for entry in history] == [(2, 1), (2, 2), (4, 1), (4, 2)]
    assert all(entry["clip_score"] > 0 and entry["protocol"]["clip"] == "tiny-clip" for entry in history)
    assert {entry["protocol"]["prompts"] for entry in history} == {"6 of the captions of training data"}
    best = json.loads((tmp_path / "run" / "best" / "evaluation.json").read_text())
    assert best == min(history[::2], key=lambda entry: entry["fid"])
    kept = load_pipeline(tmp_path / "run" / "best", base=make_stable_diffusion() if changes else None)
    assert kept("a cat", num_inference_steps=1, output_type="np").images.shape == (1, 16, 16, 3)


def test_images_are_of_the_captions_in_the_middle_of_the_guidance(tmp_path):
    trainer = make_trainer(tmp_path, w_min=1.0, w_max=4.0)
    sampler = trainer.evaluation._sampler(trainer.pipeline(), 1)
    assert sampler.prompts == tuple(CAPTIONS[row] for row in (0, 4, 9, 13, 18, 23))
    expected = text_student_sampler(trainer.pipeline(), 1, sampler.prompts, 3.5)
    assert sampler.description == expected.description == "multistep consistency, guidance 3.5"
    assert torch.equal(sampler.draw([0, 1]), expected.draw([0, 1]))


def test_measuring_changes_nothing(tmp_path):
    found = []
    for steps in (0, 1):
        trainer = make_trainer(tmp_path / str(steps), eval_steps=steps)
        trainer.train()
        found.append(torch.cat([weight.detach().flatten() for weight in trainer.unet.parameters()]))
    assert torch.equal(*found)


def test_best_goes_on_after_a_resume(tmp_path):
    make_trainer(tmp_path, checkpoint_steps=2, eval_nfes=[1], max_train_steps=2).train()
    again = make_trainer(tmp_path, resume="auto", eval_nfes=[1], max_train_steps=2)
    again.evaluation.start()
    assert again.evaluation.best == read_history(tmp_path / "evaluation.jsonl")[0]["fid"]


@pytest.mark.parametrize("make", [make_stable_diffusion, make_sdxl])
def test_encoders_may_be_in_half_precision(tmp_path, make):
    trainer = make_trainer(tmp_path, make(), teacher_dtype="bfloat16", sample_steps=2)
    trainer.train()
    assert len(read_history(tmp_path / "evaluation.jsonl")) == 4
    assert (tmp_path / "samples.png").exists() and len(list((tmp_path / "samples").iterdir())) == 4


def test_a_clip_model_needs_text(tmp_path):
    with pytest.raises(ValueError, match="`eval_clip` needs a text-to-image teacher"):
        make_trainer(tmp_path, (build_unet(), DDPMScheduler()), torch.zeros(8, 3, 8, 8), method="cd", eval_clip="x")
    with pytest.raises(ValueError, match="no CLIP model"):
        make_trainer(tmp_path, eval_clip=str(tmp_path / "nowhere"))
