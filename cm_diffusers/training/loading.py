"""Endless batches for one process of many, from any place on."""

from __future__ import annotations

import contextlib
import itertools
import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Generator, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, default_collate, get_worker_info

from cm_diffusers.training.data import StreamedImages
from cm_diffusers.training.randomness import mixed, permutation

logger = logging.getLogger(__name__)

# What keeps the random numbers of the same seed apart.
ORDER, SAMPLE, STREAM = range(3)


class EndlessSampler(Sampler[list[tuple[int, int]]]):
    """Batches of `(row, seed)` without end: one shuffled pass over the rows after another, nothing left out.

    The batches of all processes, micro-step by micro-step, are consecutive parts of one sequence that depends on the
    seed alone. So a global batch is the same however it is split, and any place in the sequence can be started from.

    Args:
        length (`int`): the number of rows.
        batch_size (`int`): of one process and micro-step.
        seed (`int`): of the order, and of the seed that each sample carries for its crop, flip and noise.
        rank, world_size (`int`): which process this is, of how many.
        start (`int`): batches that this process has had.
    """

    def __init__(self, length: int, batch_size: int, seed: int, rank: int = 0, world_size: int = 1, start: int = 0):
        self.length, self.batch_size, self.seed = length, batch_size, seed
        self.rank, self.world_size, self.start = rank, world_size, start
        self._orders: dict[int, np.ndarray] = {}

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for batch in itertools.count(self.start):
            first = (batch * self.world_size + self.rank) * self.batch_size
            yield [self._sample(position) for position in range(first, first + self.batch_size)]

    def _sample(self, position: int) -> tuple[int, int]:
        epoch, index = divmod(position, self.length)
        if epoch not in self._orders:
            self._orders = {e: order for e, order in self._orders.items() if e == epoch - 1}
            self._orders[epoch] = permutation(self.length, ORDER, self.seed, epoch)
        return int(self._orders[epoch][index]), mixed(SAMPLE, self.seed, position)


class EndlessStream(IterableDataset[dict[str, Any]]):
    """One process's part of a stream, pass after pass, each in another order; every worker has its own part.

    Items carry their seed, and as `place` the pass and how many items of it their worker has read.

    Args:
        images ([`StreamedImages`]): the stream.
        seed (`int`): of order, crops, flips and noise.
        buffer_size (`int`): images among which a stream of `datasets` is shuffled.
        rank, world_size (`int`): which process this is, of how many.
        places (`Sequence[Sequence[int]]`): where each worker starts.
    """

    def __init__(
        self, images: StreamedImages, seed: int, buffer_size: int, rank: int, world_size: int,
        places: Sequence[Sequence[int]],
    ) -> None:  # fmt: skip
        self.images, self.seed, self.buffer_size = images, seed, buffer_size
        self.rank, self.world_size, self.places = rank, world_size, places

    def __iter__(self) -> Iterator[dict[str, Any]]:
        info = get_worker_info()
        worker = 0 if info is None else info.id
        epoch, start = self.places[worker]
        while True:
            order = mixed(ORDER, self.seed, epoch) % 2**32
            any_left = start > 0
            for index, item in self.images.part(epoch, order, self.buffer_size, self.rank, self.world_size, start):
                any_left = True
                seed = mixed(STREAM, self.seed, self.rank, worker, epoch, index)
                augmented = self.images.transform.augment(item, torch.Generator().manual_seed(seed))
                yield {**augmented, "seed": torch.tensor(seed), "place": torch.tensor([epoch, index + 1])}
            if not any_left:
                return
            epoch, start = epoch + 1, 0


class Batches:
    """The batches of one process, on the CPU: `seed`, and what the dataset's items hold, captions as a list.

    Args:
        dataset: a prepared dataset, with rows or streamed.
        batch_size (`int`): of one process and micro-step.
        seed (`int`): of everything random about the data.
        num_workers (`int`): processes that load images; no more than a stream has shards.
        rank, world_size (`int`): which process this is, of how many.
    """

    def __init__(
        self, dataset: Dataset[Any], batch_size: int, seed: int, num_workers: int = 0, rank: int = 0,
        world_size: int = 1,
    ) -> None:  # fmt: skip
        self.dataset, self.batch_size, self.seed = dataset, batch_size, seed
        self.rank, self.world_size = rank, world_size
        self.is_stream = isinstance(dataset, StreamedImages)
        self.num_workers = num_workers
        if isinstance(dataset, StreamedImages):
            shards = dataset.shards_of_a_rank(world_size)
            self.num_workers = min(num_workers, shards or 1)  # what has no shards would be read by each of them
            if self.num_workers < num_workers:
                logger.info(
                    "The stream has %s shards a process: %d workers read it.", shards or "no", self.num_workers
                )
        self._done = 0
        self._places: list[list[int]] = [[0, 0] for _ in range(self._parts)]
        self._round = [list(place) for place in self._places]

    @property
    def _parts(self) -> int:
        return max(self.num_workers, 1)

    def state(self) -> dict[str, Any]:
        """Where to go on: for rows the number of batches, for streams the place of each worker as well."""
        return {"batches": self._done} | ({"places": self._round} if self.is_stream else {})

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from `state`: rows in no time; of a stream, the pass is read up to its place, without decoding."""
        self._done = state["batches"]
        if self.is_stream:
            self._places, self._round = ([list(place) for place in state["places"]] for _ in range(2))

    def __iter__(self) -> Generator[dict[str, Any], None, None]:
        # Of a stream, the batches since the workers' places were noted come again, and are passed over.
        first = self._done - (self._done % self._parts if self.is_stream else 0)
        with _sigterm_left_to_workers() if self.num_workers else contextlib.nullcontext():
            batches = iter(self._loader())
        for index, batch in enumerate(batches, first):
            place = batch.pop("place", None)
            if place is not None:
                self._places[index % self._parts] = place[-1].tolist()
            if index < self._done:
                continue
            self._done += 1
            if self._done % self._parts == 0:
                self._round = [list(place) for place in self._places]
            yield batch

    def _loader(self) -> DataLoader[dict[str, Any]]:
        common: dict[str, Any] = {
            "num_workers": self.num_workers,
            "pin_memory": torch.cuda.is_available(),
            "worker_init_fn": _outlast_sigterm,
            "generator": torch.Generator().manual_seed(self.seed),  # none of torch's global random numbers
        }
        if isinstance(self.dataset, StreamedImages):
            buffer_size = max(1000, 10 * self.batch_size)
            stream = EndlessStream(self.dataset, self.seed, buffer_size, self.rank, self.world_size, self._places)
            return DataLoader(stream, batch_size=self.batch_size, drop_last=True, **common)
        length = len(self.dataset)  # type: ignore[arg-type]
        sampler = EndlessSampler(length, self.batch_size, self.seed, self.rank, self.world_size, self._done)
        return DataLoader(self.dataset, batch_sampler=sampler, **common)


@contextlib.contextmanager
def _sigterm_left_to_workers() -> Iterator[None]:
    """Workers that are forked within have SIGTERM blocked from the first: it would meet the handler of the run."""
    # A server that forks others would hand the block on to all of them.
    if not hasattr(signal, "sigwaitinfo") or multiprocessing.get_start_method() != "fork":
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _outlast_sigterm(worker: int) -> None:
    """Let a worker end when its run says so, not when a cluster tells every process to: the run has a step to finish.

    Without this, it dies of a worker that was terminated, before it can write a checkpoint.
    """
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # where workers are not forked
        threading.Thread(target=_end_when_told_by, args=(os.getppid(),), daemon=True).start()


def _end_when_told_by(run: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != run:
        pass
    os._exit(0)


def first_images(dataset: Any, count: int) -> dict[str, Any]:
    """Up to `count` items, the first, as one batch with seeds: cropped and flipped alike every time."""
    if isinstance(dataset, StreamedImages):
        items = [{**item, "seed": torch.tensor(i)} for i, item in enumerate(dataset.first(count))]
    else:
        items = [dataset[row, row] for row in range(min(count, len(dataset)))]
    batch: dict[str, Any] = default_collate(items)
    return batch
