"""Tasks in several processes, each with its share of the threads."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import torch

T, R = TypeVar("T"), TypeVar("R")


def parallel(function: Callable[[T], R], tasks: Sequence[T], jobs: int, log_folder: Path) -> Iterator[R]:
    """The results of all tasks as they become ready: done here one after the other, or in so many processes.

    When the caller ends before they do, the processes are sent SIGTERM.

    Args:
        function (`Callable`): of a module, so that other processes find it.
        tasks (`Sequence`): its arguments.
        jobs (`int`): processes.
        log_folder (`Path`): where each writes what it has to say, but for results.
    """
    jobs = min(jobs, len(tasks))
    if jobs <= 1:
        yield from map(function, tasks)
        return
    log_folder.mkdir(parents=True, exist_ok=True)
    threads = max(1, torch.get_num_threads() // jobs)
    with multiprocessing.get_context("spawn").Pool(jobs, start_worker, (threads, log_folder)) as pool:
        yield from pool.imap_unordered(function, tasks)


def start_worker(threads: int, log_folder: Path) -> None:
    """Called in each new process. Ctrl-C is for the caller alone, which ends the others."""
    torch.set_num_threads(threads)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.stderr = (log_folder / f"worker-{os.getpid()}.log").open("w", buffering=1)
