"""The memory of a process over ten thousand tiny steps: it must not grow.

    python examples/benchmarks/endurance.py [--steps 10000] [--streaming]

Steps, logging, samples and checkpoints are those of a real run, on an 8 x 8 UNet.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import tempfile

import datasets
import psutil
import torch
from diffusers import DDPMScheduler, UNet2DModel
from PIL import Image

from cm_diffusers import ConsistencyConfig, ConsistencyTrainer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--streaming", action="store_true", help="from a stream, read again and again")
    options = parser.parse_args()
    unet = UNet2DModel(
        sample_size=8, block_out_channels=(8,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
        layers_per_block=1, norm_num_groups=4,
    )  # fmt: skip
    pixels = torch.randint(0, 256, (500, 8, 8, 3), dtype=torch.uint8).numpy()
    table = datasets.Dataset.from_dict({"image": [Image.fromarray(image) for image in pixels]})
    images = table.to_iterable_dataset(num_shards=4) if options.streaming else table
    with tempfile.TemporaryDirectory() as folder:
        config = ConsistencyConfig(
            distance="pseudo_huber", batch_size=8, conversion_steps=0, teacher_check=False, output_dir=folder,
            max_train_steps=options.steps, logging_steps=10, sample_steps=1000, checkpoint_steps=500, random_flip=True,
        )  # fmt: skip
        trainer = ConsistencyTrainer(config, teacher=(unet, DDPMScheduler()), train_dataset=images)
        resident = watch(trainer, every=options.steps // 20)
        trainer.train()
    first, last = resident[1], resident[-1]  # the first twentieth fills caches
    print("MiB resident:", [round(value / 2**20, 1) for value in resident])
    print(f"growth from step {options.steps // 10} to step {options.steps}: {100 * (last / first - 1):.2f} %")


def watch(trainer: ConsistencyTrainer, every: int) -> list[int]:
    resident: list[int] = []
    advance = trainer.advance

    def watched(phase, batches):
        record = advance(phase, batches)
        if trainer.step % every == 0:
            gc.collect()
            _give_back_unused_memory()
            resident.append(psutil.Process().memory_info().rss)
        return record

    trainer.advance = watched
    return resident


def _give_back_unused_memory() -> None:
    """What the C library keeps for later is not in use."""
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    except OSError:
        pass


if __name__ == "__main__":
    main()
