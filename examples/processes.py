"""Tasks in several processes, each with its share of the threads."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import torch

ENDING = (signal.SIGINT, signal.SIGTERM)
T, R = TypeVar("T"), TypeVar("R")


def parallel(function: Callable[[T], R], tasks: Sequence[T], jobs: int, log_folder: Path) -> Iterator[R]:
    """The results of all tasks as they become ready: done here one after the other, or in so many processes.

    When the caller ends before they do, the processes are sent SIGTERM until they have ended; if it is killed, they
    see to it themselves.

    Args:
        function (`Callable`): of a module, so that other processes find it.
        tasks (`Sequence`): its arguments.
        jobs (`int`): processes.
        log_folder (`Path`): where each writes what it has to say, but for results.

    Raises:
        `BrokenProcessPool`: if a process was killed.
    """
    jobs = min(jobs, len(tasks))
    if jobs <= 1:
        yield from map(function, tasks)
        return
    log_folder.mkdir(parents=True, exist_ok=True)
    threads = max(1, torch.get_num_threads() // jobs)
    spawn, left = multiprocessing.get_context("spawn"), iter(tasks)
    given = (threads, multiprocessing.get_start_method(), log_folder)
    with heard_once(), ProcessPoolExecutor(jobs, spawn, start_worker, given) as pool:
        # One for each process at a time: those that wait in the pool's queue could not be taken back.
        running = {pool.submit(function, task) for task in islice(left, jobs)}
        try:
            while running:
                # Another thread may take a signal, and this one notices when it goes on.
                done, running = wait(running, timeout=1, return_when=FIRST_COMPLETED)
                running |= {pool.submit(function, task) for task in islice(left, len(done))}
                yield from (future.result() for future in done)
        finally:
            if running:
                end_children()


@contextmanager
def heard_once() -> Iterator[None]:
    """SIGINT and SIGTERM end the processes, then do what they did; once, as a second would leave the first undone."""
    before: dict[int, Any] = {number: signal.getsignal(number) for number in ENDING}

    def hear(number: int, frame: Any) -> None:
        end_children()
        if callable(handler := before[number]):
            handler(number, frame)
        else:
            signal.signal(number, handler)
            os.kill(os.getpid(), number)

    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, hear)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def end_children() -> None:
    """SIGTERM, again and again: who saves first and goes on to ask for a task may wait for one that has ended."""
    for number in ENDING:
        signal.signal(number, signal.SIG_IGN)
    while children := multiprocessing.active_children():
        for child in children:
            child.terminate()
        for child in children:
            child.join(1)


def end_without_parent() -> None:
    """The same for a process whose parent was killed: it would wait for a task for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    while True:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1)


def start_worker(threads: int, start_method: str, log_folder: Path) -> None:
    """Called in each new process. Ctrl-C is for the caller alone, which ends the others."""
    torch.set_num_threads(threads)
    # Of the processes that load images, which would be spawned like this one, at twenty seconds a run.
    multiprocessing.set_start_method(start_method, force=True)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=end_without_parent, daemon=True).start()
    sys.stderr = (log_folder / f"worker-{os.getpid()}.log").open("w", buffering=1)
