"""One-step sampling by the pipeline, over one bare forward pass and over stock ConsistencyModelPipeline.

python examples/benchmarks/sampling.py [--batch_size 64] [--size 32] [--channels 64] [--rounds 20]
"""

from __future__ import annotations

import argparse

import torch
from diffusers import CMStochasticIterativeScheduler, ConsistencyModelPipeline
from setting import make_network
from timing import median_seconds, peak_memory

from cm_diffusers import ConsistencyPipeline


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--size", type=int, default=32, help="image size in pixels")
    parser.add_argument("--channels", type=int, default=64, help="channels of the widest feature map")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    device = torch.device(options.device)

    unet = make_network(options.size, options.channels).to(device)
    stock = ConsistencyModelPipeline(unet.eval(), CMStochasticIterativeScheduler()).to(device)
    ours = ConsistencyPipeline(unet, stock.scheduler).to(device)
    for pipeline in (stock, ours):
        pipeline.set_progress_bar_config(disable=True)
    noise = torch.randn(options.batch_size, 3, options.size, options.size, device=device)
    timestep = torch.tensor(1000.0, device=device)
    arguments = {"batch_size": options.batch_size, "latents": noise, "output_type": "pt"}

    def bare() -> None:
        with torch.no_grad():
            unet(noise, timestep, return_dict=False)

    seconds = median_seconds(
        {"forward": bare, "ours": lambda: ours(**arguments), "stock": lambda: stock(**arguments)},
        options.rounds,
        device,
    )
    print(
        f"one step, batch {options.batch_size}, {options.size} x {options.size}, {device}, "
        f"{torch.get_num_threads()} threads"
    )
    print(f"pipeline {seconds['ours'] * 1000:.2f} ms, forward {seconds['forward'] * 1000:.2f} ms")
    print(f"pipeline / bare forward:      {seconds['ours'] / seconds['forward']:.3f}")
    print(f"pipeline / stock pipeline:    {seconds['ours'] / seconds['stock']:.3f}")
    print(f"peak memory: {peak_memory(device)}")


if __name__ == "__main__":
    main()
