"""The throughput of two ranks over twice that of one, each with one thread (or one GPU) and the same batch.

    python examples/benchmarks/ranks.py [--batch_size 32] [--size 16] [--channels 64] [--steps 15] [--rounds 3]

One rank, two ranks, and two single ranks side by side that know nothing of each other, are run in turn, `--rounds`
times; a run's throughput is that of its median step. The last are what the machine allows.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time

import torch
from setting import make_trainer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch_size", type=int, default=32, help="images per rank")
    parser.add_argument("--size", type=int, default=16, help="image size in pixels")
    parser.add_argument("--channels", type=int, default=64, help="channels of the widest feature map")
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    if "RANK" in os.environ:
        rank(options)
        return
    images_per_second: dict[str, list[float]] = {"one rank": [], "two ranks": [], "two apart": []}
    for _ in range(options.rounds):
        images_per_second["one rank"].append(options.batch_size * steps_per_second(start(1)))
        images_per_second["two ranks"].append(2 * options.batch_size * steps_per_second(start(2)))
        images_per_second["two apart"].append(options.batch_size * steps_per_second(start(1), start(1)))
    one, two, apart = (statistics.median(found) for found in images_per_second.values())
    print(f"batch {options.batch_size} per rank, {options.size} x {options.size}, one thread per rank")
    print("images/s:", {name: [round(value, 1) for value in found] for name, found in images_per_second.items()})
    print(f"two ranks / (2 x one rank): {two / (2 * one):.3f}")
    print(f"two apart / (2 x one rank): {apart / (2 * one):.3f}")


def start(ranks: int) -> subprocess.Popen[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    return subprocess.Popen(
        [sys.executable, *launcher, *sys.argv], env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip


def steps_per_second(*runs: subprocess.Popen[str]) -> float:
    """Of all runs together."""
    return sum(1 / float(run.communicate()[0].strip().splitlines()[-1]) for run in runs)


def rank(options: argparse.Namespace) -> None:
    """One of the processes: prints the seconds of its median step if it is the first."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(folder, options.batch_size, options.size, options.channels)
        batches, seconds = iter(trainer.batches), []
        for _ in range(options.steps + 2):
            start = time.perf_counter()
            trainer.watch.after(trainer.advance(trainer.phases[-1], batches))
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
        if trainer.accelerator.is_main_process:
            print(statistics.median(seconds[2:]), flush=True)
        trainer.accelerator.end_training()


if __name__ == "__main__":
    main()
