"""Ratios of times within one run, and peak memory."""

from __future__ import annotations

import resource
import statistics
import sys
import time
from collections.abc import Callable

import torch


def median_seconds(functions: dict[str, Callable[[], object]], rounds: int, device: torch.device) -> dict[str, float]:
    """The median time of each function, all of them called in turn in every round, so that a busy spell hits all.

    On a GPU each is called several times in a row before it is waited for, as a loop would: what the host does
    meanwhile costs nothing while the GPU has work.
    """
    calls = 1 if device.type == "cpu" else 8
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        function()
    for _ in range(rounds):
        for name, function in functions.items():
            synchronize(device)
            start = time.perf_counter()
            for _ in range(calls):
                function()
            synchronize(device)
            seconds[name].append((time.perf_counter() - start) / calls)
    return {name: statistics.median(values) for name, values in seconds.items()}


def synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def peak_memory(device: torch.device) -> str:
    """Of the whole process on the CPU, of the allocator on a GPU, in MiB."""
    if device.type == "cuda":
        return f"{torch.cuda.max_memory_allocated(device) / 2**20:.0f} MiB on the GPU"
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit:.0f} MiB resident"
