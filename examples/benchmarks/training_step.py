"""The time of a consistency-distillation step, over the sum of its bare parts.

    python examples/benchmarks/training_step.py [--batch_size 64] [--size 16] [--channels 64] [--rounds 20]

The parts are two passes of the teacher (Heun), one of the target, the student forward and backward, and the optimiser;
the step adds to them the noise, the preconditioning, the distance, clipping, both averages, the watch over bad steps
and the loop.
"""

from __future__ import annotations

import argparse
import tempfile

import torch
from setting import make_trainer
from timing import median_seconds, peak_memory

from cm_diffusers import ConsistencyTrainer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--size", type=int, default=16, help="image size in pixels")
    parser.add_argument("--channels", type=int, default=64, help="channels of the widest feature map")
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        measure(make_trainer(folder, options.batch_size, options.size, options.channels), options)


def measure(trainer: ConsistencyTrainer, options: argparse.Namespace) -> None:
    device = trainer.accelerator.device
    phase, batches = trainer.phases[-1], iter(trainer.batches)
    x = torch.randn(options.batch_size, 3, options.size, options.size, device=device)
    time = torch.full((options.batch_size,), 500.0, device=device)
    target = trainer.averages.target.network

    def step() -> None:
        trainer.watch.after(trainer.advance(phase, batches))

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
