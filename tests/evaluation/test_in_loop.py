"""Evaluation while a run trains: it changes nothing, survives a resume, and keeps the best."""

import json

import diffusers
import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import build_unet
from torch import nn

from cm_diffusers import ConsistencyConfig, ConsistencyPipeline, ConsistencyTrainer
from cm_diffusers.evaluation import Reference
from cm_diffusers.evaluation.in_loop import read_history, without_augmentation
from cm_diffusers.training.data import prepare_dataset
from cm_diffusers.training.images import ImageSpec

IMAGES = torch.rand(40, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
FEATURES = "test_in_loop:Corners"


class Corners(nn.Module):
    def forward(self, images):
        return images[..., :2, :2].float().flatten(1)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CM_DIFFUSERS_CACHE", str(tmp_path / "cache"))


def make_trainer(folder, **changes):
    AcceleratorState._reset_state(reset_partial_state=True)
    settings = {
        "distance": "pseudo_huber", "num_levels": 5, "batch_size": 8, "max_train_steps": 6, "conversion_steps": 2,
        "teacher_check": False, "output_dir": str(folder), "tracker": "none", "sample_steps": 0, "random_flip": True,
        "learning_rate": 1e-2, "eval_features": FEATURES, "eval_num_images": 12, "checkpoint_steps": 4,
    }  # fmt: skip
    config = ConsistencyConfig.from_dict({**settings, **changes})
    return ConsistencyTrainer(config, teacher=(build_unet(), diffusers.DDPMScheduler()), train_dataset=IMAGES)


def weights(network):
    return torch.cat([parameter.detach().flatten() for parameter in network.parameters()])


def test_evaluation_is_written_changes_nothing_and_keeps_the_best(tmp_path):
    make_trainer(tmp_path / "plain").train()
    trainer = make_trainer(tmp_path / "run", eval_steps=2, eval_nfes=[1, 2])
    trainer.train()
    assert torch.equal(weights(trainer.unet), weights(make_trained(tmp_path / "plain")))
    history = read_history(tmp_path / "run" / "evaluation.jsonl")
    assert [(entry["step"], entry["nfe"]) for entry in history] == [(s, n) for s in (4, 6, 8) for n in (1, 2)]
    assert all(entry["protocol"]["num_images"] == 12 for entry in history)
    best = min((entry for entry in history if entry["nfe"] == 1), key=lambda entry: entry["fid"])
    assert trainer.evaluation.best == best["fid"]
    saved = ConsistencyPipeline.from_pretrained(tmp_path / "run" / "best")
    final = ConsistencyPipeline.from_pretrained(tmp_path / "run")
    assert torch.equal(weights(saved.unet), weights(final.unet)) == (best["step"] == 8)


def make_trained(folder):
    """The weights of the last checkpoint, without the average."""
    trainer = make_trainer(folder, resume="auto")
    trainer.memory.resume("auto")
    return trainer.unet


def test_a_resumed_run_forgets_what_it_has_not_done_yet(tmp_path):
    trainer = make_trainer(tmp_path, eval_steps=1)
    follow = trainer._follow

    def stop_at_six(phase):
        follow(phase)
        if trainer.step == 6:
            raise KeyboardInterrupt

    trainer._follow = stop_at_six
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    with (tmp_path / "evaluation.jsonl").open("a") as file:
        file.write('{"step": 6, "nf')  # torn
    make_trainer(tmp_path, eval_steps=1, resume="auto").train()
    history = [json.loads(line) for line in (tmp_path / "evaluation.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in history] == [3, 4, 5, 6, 7, 8]


@pytest.mark.parametrize("center_crop", [True, False])
def test_the_reference_is_neither_cropped_at_random_nor_flipped(center_crop):
    import datasets
    import numpy as np

    wide = np.random.default_rng(0).integers(0, 256, (9, 8, 16, 3), dtype=np.uint8)
    table = datasets.Dataset.from_dict({"image": list(wide)}, features=datasets.Features({"image": datasets.Image()}))
    prepared = prepare_dataset(table, ImageSpec(3, 8, 8, center_crop=center_crop, random_flip=True))
    prepared[0]  # fills the cache
    state = torch.get_rng_state()
    found = Reference.from_dataset(without_augmentation(prepared), "wide").images
    assert torch.equal(found, torch.from_numpy(wide[:, :, 4:12]).permute(0, 3, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert prepared.transform.spec.random_flip
