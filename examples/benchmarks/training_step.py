"""The time of a consistency-distillation step, over the sum of its bare parts.

    python examples/benchmarks/training_step.py [--batch_size 64] [--size 16] [--channels 64] [--rounds 20]

The parts are two passes of the teacher (Heun), one of the target, the student forward and backward, and the optimiser;
the step adds to them the noise, the preconditioning, the distance, clipping, both averages and the loop.
"""

from __future__ import annotations

import argparse
import tempfile

import torch
from diffusers import DDPMScheduler, UNet2DModel
from timing import median_seconds, peak_memory

from cm_diffusers import ConsistencyConfig, ConsistencyTrainer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--size", type=int, default=16, help="image size in pixels")
    parser.add_argument("--channels", type=int, default=64, help="channels of the widest feature map")
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args()

    teacher = UNet2DModel(
        sample_size=options.size,
        block_out_channels=(options.channels, options.channels),
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        layers_per_block=1,
    )
    with tempfile.TemporaryDirectory() as folder:
        config = ConsistencyConfig(
            distance="pseudo_huber", batch_size=options.batch_size, conversion_steps=0, teacher_check=False,
            output_dir=folder, tracker="none", target="ema", mu=0.95,
        )  # fmt: skip
        images = torch.randn(8 * options.batch_size, 3, options.size, options.size)
        trainer = ConsistencyTrainer(config, teacher=(teacher, DDPMScheduler()), train_dataset=images)
        measure(trainer, options)


def measure(trainer: ConsistencyTrainer, options: argparse.Namespace) -> None:
    device = trainer.accelerator.device
    phase, batches = trainer.phases[-1], iter(trainer.batches)
    x = torch.randn(options.batch_size, 3, options.size, options.size, device=device)
    time = torch.full((options.batch_size,), 500.0, device=device)
    target = trainer.target_ema.network

    def step() -> None:
        trainer._optimise(phase, batches)
        trainer._follow(phase)

    def without_gradient(network: torch.nn.Module) -> None:
        with torch.no_grad():
            network(x, time, return_dict=False)

    def student() -> None:
        trainer.student(x, time, return_dict=False)[0].square().mean().backward()

    def optimizer() -> None:
        trainer.optimizer.step()

    def parts() -> None:
        without_gradient(trainer.teacher.unet)
        without_gradient(trainer.teacher.unet)
        without_gradient(target)
        student()
        optimizer()
        trainer.optimizer.zero_grad()

    seconds = median_seconds({"step": step, "parts": parts}, options.rounds, device)
    print(
        f"cd step, Heun, batch {options.batch_size}, {options.size} x {options.size}, {device}, "
        f"{torch.get_num_threads()} threads"
    )
    print(f"step {seconds['step'] * 1000:.1f} ms, its parts {seconds['parts'] * 1000:.1f} ms")
    print(f"step / sum of parts: {seconds['step'] / seconds['parts']:.3f}")
    print(f"peak memory: {peak_memory(device)}")


if __name__ == "__main__":
    main()
