"""A consistency-distillation step in each precision, compiled or not, against the measured speed of matrix products.

    python examples/benchmarks/precision.py [--batch_size 64] [--size 16] [--channels 64] [--rounds 10] [--compile]

The floating-point operations of a step are counted by torch; the ceiling is the fastest square matrix product in the
same precision on the same device.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator

import torch
from accelerate.state import AcceleratorState
from setting import make_trainer
from timing import median_seconds, synchronize
from torch.utils.flop_counter import FlopCounterMode

from cm_diffusers import ConsistencyTrainer

ON_GPU = torch.cuda.is_available()
# Name, settings, precision of the products.
VARIANTS = [
    ("fp32", {"allow_tf32": False}, torch.float32),
    ("tf32", {"allow_tf32": True}, torch.float32),
    ("bf16", {"mixed_precision": "bf16"}, torch.bfloat16),
    ("bf16, teacher too", {"mixed_precision": "bf16", "teacher_dtype": "bfloat16"}, torch.bfloat16),
    ("bf16, channels last", {"mixed_precision": "bf16", "channels_last": True}, torch.bfloat16),
    ("bf16, compiled", {"mixed_precision": "bf16", "channels_last": True, "compile": True}, torch.bfloat16),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--size", type=int, default=16, help="image size in pixels")
    parser.add_argument("--channels", type=int, default=64, help="channels of the widest feature map")
    parser.add_argument("--layers", type=int, default=1, help="layers per block")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--compile", action="store_true", help="also compiled")
    options = parser.parse_args()
    device = torch.device("cuda" if ON_GPU else "cpu")
    with tempfile.TemporaryDirectory() as folder:
        steps, operations = {}, {}
        for name, settings, _ in variants(options.compile):
            AcceleratorState._reset_state(reset_partial_state=True)
            shape = (options.batch_size, options.size, options.channels, options.layers)
            trainer = make_trainer(folder, *shape, **settings)
            operations[name] = count_operations(trainer)
            steps[name] = stepper(trainer, settings.get("allow_tf32", True))
        seconds = median_seconds(steps, options.rounds, device)
    print(f"batch {options.batch_size}, {options.size} x {options.size}, {device}, {torch.get_num_threads()} threads")
    for name, settings, dtype in variants(options.compile):
        ceiling = fastest_product(dtype, device, settings.get("allow_tf32", True))
        speed = operations[name] / seconds[name]
        print(
            f"{name:>20}: {1000 * seconds[name]:8.1f} ms, over fp32 {seconds[name] / seconds['fp32']:.3f}, "
            f"{speed / 1e12:.3f} of {ceiling / 1e12:.3f} TFLOP/s, {100 * speed / ceiling:.0f} % of the ceiling"
        )


def variants(with_compile: bool) -> list[tuple[str, dict, torch.dtype]]:
    return [v for v in VARIANTS if (ON_GPU or v[0] != "tf32") and (with_compile or "compile" not in v[1])]


def stepper(trainer: ConsistencyTrainer, allow_tf32: bool):
    batches: Iterator = iter(trainer.batches)

    def step() -> None:
        if ON_GPU:
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allow_tf32
        trainer.watch.after(trainer.advance(trainer.phases[-1], batches))

    for _ in range(2):
        step()
    return step


def count_operations(trainer: ConsistencyTrainer) -> int:
    """In products and convolutions: the student forward and back, a pass of the target, two of the teacher."""
    images = next(iter(trainer.batches))["images"].to(trainer.accelerator.device)
    time = torch.full((len(images),), 500.0, device=images.device)
    with FlopCounterMode(display=False) as counter, trainer.accelerator.autocast():
        type(trainer.unet).forward(trainer.unet, images, time, return_dict=False)[0].float().mean().backward()
    trainer.optimizer.zero_grad()
    back_and_forth = counter.get_total_flops()
    with FlopCounterMode(display=False) as counter, torch.no_grad(), trainer.accelerator.autocast():
        type(trainer.unet).forward(trainer.unet, images, time, return_dict=False)
    return back_and_forth + 3 * counter.get_total_flops()


def fastest_product(dtype: torch.dtype, device: torch.device, allow_tf32: bool) -> float:
    """Floating-point operations per second."""
    if ON_GPU:
        torch.backends.cuda.matmul.allow_tf32 = allow_tf32
    best = 0.0
    for size in (512, 1024, 2048) if device.type == "cpu" else (4096, 8192):
        a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
        seconds = median_seconds({"product": lambda a=a, b=b: a @ b}, 10, device)["product"]
        best = max(best, 2 * size**3 / seconds)
    synchronize(device)
    return best


if __name__ == "__main__":
    main()
