"""A run small enough to be killed, split and cut in two many times: `python tests/tiny_run.py [--field value ...]`.

It distils a random 8 x 8 UNet on 61 images, and at the end writes the loss of every step beside the student. Works
alone, and under torchrun or `accelerate launch`. It says each step on its output, and listens to the environment:

    TINY_TEXT       a tiny Stable Diffusion as the teacher, and captions
    TINY_DROPOUT    the network's dropout
    TINY_PAUSE      seconds to wait after each step
    TINY_DOCTOR     look at the run only, and write what it needs to footprint.json
    TINY_OTHER_DATA so many images are missing from all processes but the first
    TINY_BAD_STEP   a step whose loss is not a number
    TINY_SLOW_DISK  seconds that a checkpoint's file takes to be flushed
"""

from __future__ import annotations

import dataclasses
import faulthandler
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import datasets
import diffusers
import torch
from conftest import build_unet
from PIL import Image
from stable_diffusion import make_stable_diffusion

from cm_diffusers import ConsistencyConfig, ConsistencyTrainer
from cm_diffusers.commands.training import parse_config
from cm_diffusers.doctor import measure_footprint
from cm_diffusers.training import checkpoints
from cm_diffusers.training.runtime import thread_names

SETTINGS = {
    "distance": "pseudo_huber", "weighting": "inverse_gap", "num_levels": 6, "batch_size": 8, "max_train_steps": 12,
    "conversion_steps": 3, "teacher_check": False, "tracker": "none", "sample_steps": 0, "checkpoint_steps": 2,
    "logging_steps": 1, "random_flip": True, "resume": "auto", "optimizer": "adam", "learning_rate": 1e-3,
    "distributed_timeout": 60.0,
}  # fmt: skip
HANGS_AFTER = 300.0  # seconds; a run that takes longer says where it is, and ends


def images() -> torch.Tensor:
    missing = int(os.environ.get("TINY_OTHER_DATA", 0)) if int(os.environ.get("RANK", 0)) else 0
    return torch.rand(61, 3, 8, 8, generator=torch.Generator().manual_seed(0))[missing:] * 2 - 1


def stream() -> datasets.IterableDataset:
    pixels = ((images() + 1) * 127.5).byte().permute(0, 2, 3, 1).numpy()
    table = datasets.Dataset.from_dict({"image": [Image.fromarray(image) for image in pixels]})
    return table.to_iterable_dataset(num_shards=4)


def captioned() -> list[dict[str, Any]]:
    large = torch.nn.functional.interpolate(images(), scale_factor=2)
    return [{"image": image, "caption": f"cat {row}"} for row, image in enumerate(large)]


def slow_down_the_disk() -> None:
    flush, pause = checkpoints.flush, float(os.environ.get("TINY_SLOW_DISK", 0))

    def slow(path: Path) -> None:
        time.sleep(pause)
        flush(path)

    checkpoints.flush = slow


def watch(trainer: ConsistencyTrainer) -> dict[int, float]:
    """The loss of every step over all processes, filled while it trains."""
    losses: dict[int, float] = {}
    stepper, pause = trainer.stepper, float(os.environ.get("TINY_PAUSE", 0))
    losses_of, bad_step = stepper.losses, int(os.environ.get("TINY_BAD_STEP", -1))

    def watched(phase, step, batches):
        record = stepper(phase, step, batches)
        losses[record.step] = float(trainer.accelerator.reduce(record.losses.mean(), "mean"))
        if trainer.accelerator.is_main_process:
            print("step", record.step, flush=True)
        time.sleep(pause)
        return record

    def poisoned(*arguments):
        found = losses_of(*arguments)
        return found._replace(values=found.values * float("nan")) if trainer.step == bad_step else found

    trainer.stepper, stepper.losses = watched, poisoned
    return losses


def main(arguments: list[str]) -> None:
    torch.set_num_threads(1)
    faulthandler.dump_traceback_later(HANGS_AFTER, exit=True)
    slow_down_the_disk()
    config = ConsistencyConfig.from_dict({**SETTINGS, **parse_config("distill", arguments, "cd")})
    teacher: Any = build_unet(dropout=float(os.environ.get("TINY_DROPOUT", 0))), diffusers.DDPMScheduler()
    data: Any = stream() if config.streaming else images()
    if "TINY_TEXT" in os.environ:
        teacher, data = make_stable_diffusion(), captioned()
    trainer = ConsistencyTrainer(config, teacher=teacher, train_dataset=data)
    if "TINY_DOCTOR" in os.environ:
        footprint = measure_footprint(trainer)[0]
        (Path(config.output_dir) / "footprint.json").write_text(json.dumps(dataclasses.asdict(footprint)))
        return
    losses, is_main = watch(trainer), trainer.accelerator.is_main_process
    trainer.train()
    if is_main:
        (Path(config.output_dir) / "losses.json").write_text(json.dumps(losses))
        (Path(config.output_dir) / "threads.json").write_text(json.dumps(thread_names()))


if __name__ == "__main__":
    main(sys.argv[1:])
