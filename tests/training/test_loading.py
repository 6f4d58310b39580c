"""Batches for one process of many."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import signal
import sys

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from cm_diffusers.training import loading
from cm_diffusers.training.data import prepare_dataset
from cm_diffusers.training.images import ImageSpec
from cm_diffusers.training.loading import Batches, EndlessSampler, first_images

PIXELS = ImageSpec(3, 8, 8, (0.0, 255.0))


def numbered(count=20):
    """Images with the values 0, 1, 2, ..."""
    return torch.arange(float(count))[:, None, None, None].expand(count, 3, 8, 8)


def numbered_stream(count=24, shards=4):
    column = [Image.new("RGB", (8, 8), (value,) * 3) for value in range(count)]
    return datasets.Dataset.from_dict({"image": column}).to_iterable_dataset(num_shards=shards)


def take(batches, count):
    return list(itertools.islice(iter(batches), count))


def values(batches):
    return [round(value) for batch in batches for value in batch["images"][:, 0, 0, 0].tolist()]


def global_batches(source, count, batch_size, world_size, **options):
    """The first batches over all processes."""
    ranks = []
    for rank in range(world_size):
        prepared = prepare_dataset(source, PIXELS)
        batches = Batches(prepared, batch_size, seed=1, rank=rank, world_size=world_size, **options)
        ranks.append(take(batches, count))
    return [
        {name: torch.cat([rank[step][name] for rank in ranks]) for name in ranks[0][0]} for step in range(count)
    ]  # fmt: skip


# Rows


def test_every_pass_holds_every_row_once_in_another_order():
    drawn = values(take(Batches(prepare_dataset(numbered(), PIXELS), 4, seed=1), 10))
    assert sorted(drawn[:20]) == sorted(drawn[20:]) == list(range(20))
    assert drawn[:20] != drawn[20:]
    assert drawn[:20] != list(range(20))


def test_a_batch_may_reach_into_the_next_pass():
    drawn = values(take(Batches(prepare_dataset(numbered(5), PIXELS), 4, seed=1), 5))
    for start in range(0, 20, 5):
        assert sorted(drawn[start : start + 5]) == list(range(5))


def test_order_and_seeds_depend_on_the_seed_alone():
    def drawn(seed, global_seed):
        torch.manual_seed(global_seed)
        return take(Batches(prepare_dataset(numbered(), PIXELS), 4, seed=seed), 7)

    first, again, other = drawn(1, 1), drawn(1, 2), drawn(2, 1)
    assert values(first) == values(again) != values(other)
    seeds = [torch.cat([batch["seed"] for batch in batches]).tolist() for batches in (first, again, other)]
    assert seeds[0] == seeds[1] and not set(seeds[0]) & set(seeds[2])
    assert len(set(seeds[0])) == 28  # the same row again has another


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("world_size", [2, 4])
def test_a_global_batch_is_the_same_however_it_is_split(world_size, num_workers):
    whole = global_batches(numbered(), 6, 8, 1)
    split = global_batches(numbered(), 6, 8 // world_size, world_size, num_workers=num_workers)
    accumulated = global_batches(numbered(), 6 * world_size, 8 // world_size, 1)
    accumulated = [
        {name: torch.cat([part[name] for part in accumulated[start : start + world_size]]) for name in whole[0]}
        for start in range(0, 6 * world_size, world_size)
    ]
    for parts in (split, accumulated):
        for one, other in zip(whole, parts, strict=True):
            assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_sampler_starts_anywhere():
    whole = list(itertools.islice(EndlessSampler(10, 3, seed=5, rank=1, world_size=2), 9))
    assert list(itertools.islice(EndlessSampler(10, 3, seed=5, rank=1, world_size=2, start=6), 3)) == whole[6:]


# Streams


@pytest.mark.parametrize(("world_size", "num_workers"), [(1, 0), (2, 0), (2, 2), (4, 1), (3, 0)])
def test_processes_and_workers_share_a_stream_without_overlap(world_size, num_workers):
    source = numbered_stream()
    steps = 24 // world_size // 2
    drawn = values(global_batches(source, steps, 2, world_size, num_workers=num_workers))
    assert sorted(drawn) == list(range(24))
    assert drawn != sorted(drawn)


def test_passes_over_a_stream_have_orders_of_their_own():
    drawn = values(take(Batches(prepare_dataset(numbered_stream(), PIXELS), 6, seed=1), 8))
    assert sorted(drawn[:24]) == sorted(drawn[24:])
    assert drawn[:24] != drawn[24:]


def test_no_more_workers_than_shards():
    prepared = prepare_dataset(numbered_stream(shards=4), PIXELS)
    assert Batches(prepared, 2, seed=0, num_workers=8, world_size=2).num_workers == 2
    assert Batches(prepare_dataset(numbered(), PIXELS), 2, seed=0, num_workers=8).num_workers == 8


class Squares(torch.utils.data.IterableDataset):
    """A stream of torch's own kind."""

    def __iter__(self):
        return (torch.full((3, 8, 8), float(value)) for value in range(12))


def test_a_torch_stream_is_dealt_out_in_turn():
    for num_workers in (0, 2):
        drawn = values(global_batches(Squares(), 3, 2, 2, num_workers=num_workers))
        assert drawn == [0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11]


def test_a_stream_that_can_be_read_only_once_ends():
    batches = Batches(prepare_dataset(Once(), PIXELS), 4, seed=0)
    assert values(iter(batches)) == list(range(8))


class Once(torch.utils.data.IterableDataset):
    def __init__(self):
        self.items = (torch.full((3, 8, 8), float(value)) for value in range(10))

    def __iter__(self):
        return self.items


@pytest.mark.parametrize(("stream", "num_workers"), [(False, 0), (False, 2), (True, 0), (True, 2), (True, 3)])
@pytest.mark.parametrize("done", [1, 4, 11])
def test_batches_go_on_where_they_were(stream, num_workers, done):
    def batches():
        # Pictures twice as wide as needed: crops show whether the random numbers go on, too.
        wide = np.random.default_rng(0).integers(0, 256, (24, 8, 16, 3), dtype=np.uint8)
        table = datasets.Dataset.from_dict({"image": [Image.fromarray(array) for array in wide]})
        source = table.to_iterable_dataset(num_shards=3) if stream else table
        spec = ImageSpec(3, 8, 8, center_crop=False, random_flip=True)
        return Batches(prepare_dataset(source, spec), 4, seed=3, num_workers=num_workers)

    whole = take(batches(), done + 9)
    first, second = batches(), batches()
    take(first, done)
    second.restore(first.state())
    for one, other in zip(whole[done:], take(second, 9), strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(("num_workers", "cuts"), [(2, (3, 1)), (3, (4, 4, 2)), (0, (1, 1))])
def test_a_stream_goes_on_after_one_cut_upon_another(num_workers, cuts):
    def batches():
        return Batches(prepare_dataset(numbered_stream(shards=3), PIXELS), 2, seed=3, num_workers=num_workers)

    whole = values(take(batches(), sum(cuts) + 9))
    drawn, state = [], batches().state()
    for count in (*cuts, 9):
        part = batches()
        part.restore(json.loads(json.dumps(state)))
        drawn += values(take(part, count))
        state = part.state()
    assert drawn == whole


def test_webdataset_shards_are_a_stream(tmp_path):
    for shard in range(2):
        write_shard(tmp_path / f"shard-{shard}.tar", range(6 * shard, 6 * shard + 6))
    from cm_diffusers.training.data import load_image_dataset

    for path, files in (
        (tmp_path, None),
        (tmp_path / "shard-0.tar", None),
        ("webdataset", [f"{tmp_path}/shard-*.tar"]),
    ):
        source = load_image_dataset(str(path), streaming=True, data_files=files)
        prepared = prepare_dataset(source, PIXELS, label_column="cls", num_classes=12)
        (batch,) = take(Batches(prepared, 6, seed=0), 1)
        assert torch.equal(batch["images"][:, 0, 0, 0].long(), batch["class_labels"])
    ranks = global_batches(load_image_dataset(str(tmp_path), streaming=True), 3, 2, 2)
    assert sorted(values(ranks)) == list(range(12))


def write_shard(path, numbers):
    import io
    import tarfile

    with tarfile.open(path, "w") as archive:
        for value in numbers:
            picture = io.BytesIO()
            Image.new("RGB", (8, 8), (value,) * 3).save(picture, "png")
            for suffix, content in (("png", picture.getvalue()), ("cls", str(value).encode())):
                entry = tarfile.TarInfo(f"{value:04d}.{suffix}")
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))


def test_first_images_are_the_same_every_time():
    table = numbered_stream()
    for source in (table, numbered()):
        batches = [first_images(prepare_dataset(source, PIXELS), 5) for _ in range(2)]
        assert torch.equal(batches[0]["images"], batches[1]["images"])
        assert values(batches[:1]) == [0, 1, 2, 3, 4]
    assert len(first_images(prepare_dataset(numbered(3), PIXELS), 5)["images"]) == 3


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
@pytest.mark.parametrize(("method", "blocked"), [("fork", True), ("forkserver", False)])
def test_only_what_is_forked_is_born_with_a_blocked_signal(method, blocked, monkeypatch):
    """A server would hand the block on to every process that it forks afterwards."""
    monkeypatch.setattr(multiprocessing, "get_start_method", lambda: method)
    with loading._sigterm_left_to_workers():
        assert (signal.SIGTERM in signal.pthread_sigmask(signal.SIG_BLOCK, ())) is blocked
    assert signal.SIGTERM not in signal.pthread_sigmask(signal.SIG_BLOCK, ())


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_a_worker_ends_when_its_run_says_so_however_early(monkeypatch):
    start = multiprocessing.process.BaseProcess.start

    def start_and_terminate(process):
        start(process)
        process.terminate()

    monkeypatch.setattr(multiprocessing.process.BaseProcess, "start", start_and_terminate)
    before = signal.signal(signal.SIGTERM, lambda *_: None)  # as a run that listens
    try:
        with pytest.raises(RuntimeError, match="exited unexpectedly"):
            next(iter(Batches(prepare_dataset(numbered(), PIXELS), 2, seed=0, num_workers=1)))
    finally:
        signal.signal(signal.SIGTERM, before)
    assert signal.SIGTERM not in signal.pthread_sigmask(signal.SIG_BLOCK, ())
