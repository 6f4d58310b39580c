"""A run small enough to be killed, split and cut in two many times: `python tests/tiny_run.py [--field value ...]`.

It distils a random 8 x 8 UNet (with dropout, if TINY_DROPOUT says how much) on 61 images, and at the end writes the
loss of every step beside the student. Works alone, and under torchrun or `accelerate launch`.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import diffusers
import torch
from conftest import build_unet

from cm_diffusers import ConsistencyConfig, ConsistencyTrainer
from cm_diffusers.cli import parse_config

SETTINGS = {
    "distance": "pseudo_huber", "weighting": "inverse_gap", "num_levels": 6, "batch_size": 8, "max_train_steps": 12,
    "conversion_steps": 3, "teacher_check": False, "tracker": "none", "sample_steps": 0, "checkpoint_steps": 2,
    "logging_steps": 1, "random_flip": True, "resume": "auto", "optimizer": "adam", "learning_rate": 1e-3,
}  # fmt: skip


def images() -> torch.Tensor:
    return torch.rand(61, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1


def stream():
    import datasets

    pixels = ((images() + 1) * 127.5).byte().permute(0, 2, 3, 1).numpy()
    from PIL import Image

    table = datasets.Dataset.from_dict({"image": [Image.fromarray(image) for image in pixels]})
    return table.to_iterable_dataset(num_shards=4)


def main(arguments: list[str]) -> None:
    torch.set_num_threads(1)
    config = ConsistencyConfig.from_dict({**SETTINGS, **parse_config("distill", arguments, "cd")})
    teacher = build_unet(dropout=float(os.environ.get("TINY_DROPOUT", 0))), diffusers.DDPMScheduler()
    data = stream() if config.streaming else images()
    trainer = ConsistencyTrainer(config, teacher=teacher, train_dataset=data)
    losses: dict[int, float] = {}
    original, pause = trainer._optimise, float(os.environ.get("TINY_PAUSE", 0))

    def recorded(phase, batches):
        record = original(phase, batches)
        time.sleep(pause)
        losses[record.step] = float(trainer.accelerator.reduce(record.losses.mean(), "mean"))
        return record

    trainer._optimise = recorded
    trainer.train()
    if trainer.accelerator.is_main_process:
        (Path(config.output_dir) / "losses.json").write_text(json.dumps(losses))


if __name__ == "__main__":
    main(sys.argv[1:])
