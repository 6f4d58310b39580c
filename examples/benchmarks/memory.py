"""The peak of memory over the sum of what a consistency-distillation step has to hold.

    python examples/benchmarks/memory.py [--batch_size 64] [--size 16] [--channels 64]

It has to hold the weights of student, teacher, target and evaluation average, the gradients, the optimiser's moments,
and what the backward pass needs of the forward pass. The peak is the allocator's: as torch's profiler records it on
the CPU, or as CUDA counts it.
"""

from __future__ import annotations

import argparse
import tempfile

import torch
from setting import make_trainer
from torch.profiler import ProfilerActivity, profile

from cm_diffusers import ConsistencyTrainer
from cm_diffusers.doctor import measure_footprint

VARIANTS = ({}, {"gradient_checkpointing": True}, {"mixed_precision": "bf16"}, {"optimizer": "adam"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--size", type=int, default=16, help="image size in pixels")
    parser.add_argument("--channels", type=int, default=64, help="channels of the widest feature map")
    options = parser.parse_args()
    for changes in VARIANTS:
        with tempfile.TemporaryDirectory() as folder:
            arguments = (folder, options.batch_size, options.size, options.channels)
            peak, trainer = measure_peak(*arguments, **changes)
            held = measure_footprint(trainer)[0]
            trainer.accelerator.free_memory()
        print(
            f"{changes or 'default'}: peak {peak / 2**20:.1f} MiB, held {held.total / 2**20:.1f} MiB "
            f"(activations {held.activations / 2**20:.1f}), peak / held: {peak / held.total:.3f}"
        )


def measure_peak(*arguments: object, **changes: object) -> tuple[int, ConsistencyTrainer]:
    """The most bytes in use at once during three steps, everything that came before included."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        trainer = run(*arguments, **changes)
        return torch.cuda.max_memory_allocated(), trainer
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        trainer = run(*arguments, **changes)
    in_use = most = 0
    for event in sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            in_use += event.nbytes()
            most = max(most, in_use)
    return most - trainer.dataset.dataset.tensors[0].nbytes, trainer  # the dataset is not the step's


def run(*arguments: object, **changes: object) -> ConsistencyTrainer:
    trainer = make_trainer(*arguments, **changes)
    batches = iter(trainer.batches)
    for _ in range(3):
        trainer.watch.after(trainer.advance(trainer.phases[-1], batches))
    return trainer


if __name__ == "__main__":
    main()
