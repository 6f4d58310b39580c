"""Evaluation while a run trains: it changes nothing, survives a resume, and keeps the best."""

import json
import random
import shutil

import diffusers
import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import build_unet
from torch import nn
from torch.utils.data import Dataset, IterableDataset

from cm_diffusers import ConsistencyConfig, ConsistencyPipeline, ConsistencyTrainer
from cm_diffusers.evaluation import Reference
from cm_diffusers.evaluation.in_loop import (
    TrainingEvaluation,
    forget_after,
    own_randomness,
    read_history,
    without_augmentation,
)
from cm_diffusers.hub import render_card
from cm_diffusers.hub.push import gather
from cm_diffusers.training.data import prepare_dataset
from cm_diffusers.training.images import ImageSpec
from cm_diffusers.training.record import TrainingRecord

IMAGES = torch.rand(40, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
FEATURES = "test_in_loop:Corners"


class Corners(nn.Module):
    def forward(self, images):
        return images[..., :2, :2].float().flatten(1)


class Grey(nn.Conv2d):
    """Features of images with one channel."""

    def __init__(self):
        super().__init__(1, 2, 3)

    def forward(self, images):
        return super().forward(images.float()).mean((2, 3))


class DarkCorners(nn.Module):
    def forward(self, images):
        return images[..., :2, :2].float().flatten(1) / 1000


class Flipping(Dataset):
    """Mirrors images by the global random numbers."""

    def __len__(self):
        return len(IMAGES)

    def __getitem__(self, row):
        return IMAGES[row].flip(-1) if torch.rand(()) < 0.5 else IMAGES[row]


class Stream(IterableDataset):
    def __iter__(self):
        return iter(IMAGES)


class OnlyOnce(IterableDataset):
    def __init__(self):
        self.only = iter(IMAGES)

    def __iter__(self):
        return self.only


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CM_DIFFUSERS_CACHE", str(tmp_path / "cache"))


def make_trainer(folder, data=IMAGES, teacher=None, **changes):
    AcceleratorState._reset_state(reset_partial_state=True)
    settings = {
        "distance": "pseudo_huber", "num_levels": 5, "batch_size": 8, "max_train_steps": 6, "conversion_steps": 2,
        "teacher_check": False, "output_dir": str(folder), "tracker": "none", "sample_steps": 0, "random_flip": True,
        "learning_rate": 1e-2, "eval_features": FEATURES, "eval_num_images": 12, "checkpoint_steps": 4,
    }  # fmt: skip
    config = ConsistencyConfig.from_dict({**settings, **changes})
    teacher = teacher or (build_unet(), diffusers.DDPMScheduler())
    return ConsistencyTrainer(config, teacher=teacher, train_dataset=data)


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
    record = TrainingRecord.load(tmp_path / "run" / "best")
    assert record.conversion_steps + record.steps == best["step"]
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
    follow = trainer.averages.follow

    def stop_at_six(*arguments):
        follow(*arguments)
        if trainer.step == 6:
            raise KeyboardInterrupt

    trainer.averages.follow = stop_at_six
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    with (tmp_path / "evaluation.jsonl").open("a") as file:
        file.write('{"step": 6, "nf')  # torn
    make_trainer(tmp_path, eval_steps=1, resume="auto").train()
    history = [json.loads(line) for line in (tmp_path / "evaluation.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in history] == [3, 4, 5, 6, 7, 8]


def test_a_run_begins_with_no_figures_of_another(tmp_path):
    make_trainer(tmp_path, eval_steps=3, checkpoint_steps=0).train()
    (tmp_path / ".student-killed").mkdir()
    trainer = make_trainer(tmp_path, eval_steps=3, checkpoint_steps=0, learning_rate=1e-5)
    trainer.train()
    history = read_history(tmp_path / "evaluation.jsonl")
    assert [entry["step"] for entry in history] == [3, 6, 8]
    best = json.loads((tmp_path / "best" / "evaluation.json").read_text())
    assert best == min(history, key=lambda entry: entry["fid"])
    make_trainer(tmp_path, checkpoint_steps=0).train()
    assert not (tmp_path / "evaluation.jsonl").exists() and not list(tmp_path.glob("*best*"))


def test_figures_of_other_protocols_do_not_decide_which_is_best(tmp_path):
    make_trainer(tmp_path, eval_steps=2, max_train_steps=2, eval_features="test_in_loop:DarkCorners").train()
    forget_after(tmp_path, 4)  # nothing is of later
    found = [entry["fid"] for entry in read_history(tmp_path / "evaluation.jsonl")]
    same = make_trainer(tmp_path, eval_steps=2, eval_features="test_in_loop:DarkCorners", resume="auto")
    same.evaluation.start()
    assert same.evaluation.best == found[0]
    other = make_trainer(tmp_path, eval_steps=2, resume="auto")
    other.evaluation.start()
    assert other.evaluation.best == float("inf")


def test_the_best_student_is_replaced_whole(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, eval_steps=1)
    trainer.evaluation(trainer.pipeline(), 1)
    before = sorted(path.name for path in (tmp_path / "best").iterdir())
    trainer.evaluation.best = float("inf")

    def fill_the_disk(self, folder):
        folder.mkdir()
        raise OSError("No space left on device")

    monkeypatch.setattr(ConsistencyPipeline, "save_pretrained", fill_the_disk)
    with pytest.raises(OSError, match="No space"):
        trainer.evaluation(trainer.pipeline(), 2)
    assert sorted(path.name for path in (tmp_path / "best").iterdir()) == before
    assert not list(tmp_path.glob(".student-*"))


def test_the_best_student_has_a_record_of_its_own(tmp_path):
    teacher = tmp_path / "teacher"
    diffusers.DDPMPipeline(build_unet(), diffusers.DDPMScheduler()).save_pretrained(teacher)
    (teacher / "README.md").write_text("---\nlicense: cc-by-4.0\n---\n")
    trainer = make_trainer(tmp_path / "run", teacher=str(teacher), eval_steps=4)
    trainer.step = 5
    evaluation = TrainingEvaluation(trainer.config, trainer.dataset, trainer.accelerator, record=trainer.record)
    evaluation(trainer.pipeline(), 5)
    best = shutil.move(tmp_path / "run" / "best", tmp_path / "alone")
    record = TrainingRecord.load(best)
    assert (record.conversion_steps, record.steps, record.images) == (2, 3, 40)
    gather(best, tmp_path)
    card = str(render_card(tmp_path, "me/best"))
    assert "Teacher: `teacher`, under a `DDPMScheduler`." in card and "| steps | 3 |" in card
    assert "`cc-by-4.0`, that of its teacher" in card and "license: cc-by-4.0" in card
    assert f"While it trained, at step 5: FID ↓ {evaluation.best:.4g}" in card
    assert "has not been measured" not in card


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eval_features": "nonsense"}, "`features` must be"),
        ({"eval_features": "test_in_loop:Grey"}, r"'test_in_loop:Grey' do not fit .*\(3, 8, 8\): .*to have 1 channel"),
        ({"eval_num_images": 1}, "`eval_num_images` must be at least 2"),
        ({"eval_num_reference": 1}, "`eval_num_reference` must be at least 2"),
        ({"eval_nfes": [1, 40]}, "`eval_nfes` holds 40"),
        ({"data": OnlyOnce()}, "`eval_steps` needs training images that can be read again"),
    ],
)
def test_what_cannot_work_is_found_before_training(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, eval_steps=4, **changes)


@pytest.mark.parametrize("data", [Flipping, Stream])
def test_the_reference_does_not_disturb_training(tmp_path, data):
    found = []
    for steps in (0, 2):
        trainer = make_trainer(tmp_path / str(steps), data=data(), eval_steps=steps)
        trainer.train()
        found.append(weights(trainer.unet))
    assert torch.equal(*found)


def test_own_random_numbers_are_the_same_and_leave_no_trace():
    def draw():
        return random.random(), np.random.rand(), torch.rand(()).item()

    states = random.getstate(), torch.get_rng_state()
    found = []
    for _ in range(2):
        with own_randomness(3):
            found.append(draw())
    assert found[0] == found[1]
    assert random.getstate() == states[0] and torch.equal(torch.get_rng_state(), states[1])


def test_a_dataset_is_named_without_its_place(tmp_path):
    (tmp_path / "pictures").mkdir()
    trainer = make_trainer(tmp_path / "run", eval_steps=4, dataset=str(tmp_path / "pictures"))
    assert str(tmp_path) not in trainer.evaluation.evaluator.reference.name


def test_a_diverged_student_has_no_figures_and_ends_no_run(tmp_path, caplog):
    trainer = make_trainer(tmp_path, eval_steps=1)
    next(trainer.averages.ema.network.parameters()).data.fill_(float("nan"))
    trainer.evaluation(trainer.pipeline(), 1)
    assert "the model has diverged" in caplog.text
    assert read_history(tmp_path / "evaluation.jsonl") == [] and not (tmp_path / "best").exists()


@pytest.mark.parametrize("center_crop", [True, False])
def test_the_reference_is_neither_cropped_at_random_nor_flipped(center_crop):
    import datasets

    wide = np.random.default_rng(0).integers(0, 256, (9, 8, 16, 3), dtype=np.uint8)
    table = datasets.Dataset.from_dict({"image": list(wide)}, features=datasets.Features({"image": datasets.Image()}))
    prepared = prepare_dataset(table, ImageSpec(3, 8, 8, center_crop=center_crop, random_flip=True))
    prepared[0]  # fills the cache
    state = torch.get_rng_state()
    found = Reference.from_dataset(without_augmentation(prepared), "wide").images
    assert torch.equal(found, torch.from_numpy(wide[:, :, 4:12]).permute(0, 3, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert prepared.transform.spec.random_flip
