"""An edit in several steps, over plain sampling in as many.

python examples/benchmarks/edit_step.py [--batch_size 16] [--size 32] [--channels 64] [--steps 8] [--rounds 10]
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from setting import make_network
from timing import median_seconds

from cm_diffusers import (
    ConsistencyColorizePipeline,
    ConsistencyInpaintPipeline,
    ConsistencyPipeline,
    ConsistencyScheduler,
    ConsistencySuperResolutionPipeline,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--size", type=int, default=32, help="image size in pixels")
    parser.add_argument("--channels", type=int, default=64, help="channels of the widest feature map")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    device = torch.device(options.device)

    unet = make_network(options.size, options.channels).to(device)
    plain = ConsistencyPipeline(unet.eval(), ConsistencyScheduler()).to(device)
    images = torch.rand(options.batch_size, 3, options.size, options.size)
    mask = (torch.rand(1, 1, options.size, options.size) > 0.5).float()
    small = torch.nn.functional.avg_pool2d(images, 4)
    arguments = {"num_inference_steps": options.steps, "output_type": "pt"}

    def edit(kind: type, *given: Any) -> Any:
        pipe: Any = kind.from_pipe(plain)
        pipe.set_progress_bar_config(disable=True)
        return lambda: pipe(*given, **arguments)

    plain.set_progress_bar_config(disable=True)
    functions = {
        "plain": lambda: plain(options.batch_size, **arguments),
        "inpainting": edit(ConsistencyInpaintPipeline, images, mask),
        "colouring": edit(ConsistencyColorizePipeline, images[:, :1]),
        "super-resolution": edit(ConsistencySuperResolutionPipeline, small, 4),
    }
    seconds = median_seconds(functions, options.rounds, device)
    print(
        f"{options.steps} steps, batch {options.batch_size}, {options.size} x {options.size}, {device}, "
        f"{torch.get_num_threads()} threads: {seconds['plain'] * 1000:.1f} ms without an edit"
    )
    for name in list(functions)[1:]:
        print(f"{name + ' / plain:':<26}{seconds[name] / seconds['plain']:.3f}")


if __name__ == "__main__":
    main()
