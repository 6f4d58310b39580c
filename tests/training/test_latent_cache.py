"""Caches of latents: whole or refused, resumed, and read row by row."""

from __future__ import annotations

import itertools
import json
import pickle
import subprocess
import sys

import pytest
import torch
from damaging import damage
from safetensors import SafetensorError

from cm_diffusers.training import latent_cache
from cm_diffusers.training.latent_cache import CachedLatents, CacheError, CacheWriter
from cm_diffusers.training.loading import Batches, first_images

ROWS, SHARD_ROWS = 22, 8
IDENTITY = {"dataset": {"rows": ROWS, "digest": "abc"}, "vae": "sd", "size": (8, 8)}


def tensors(start, stop, dtype=torch.float32):
    """What belongs to the rows: numbers that depend on the row alone."""
    rows = torch.arange(start, stop)
    embeddings = torch.stack([torch.randn(5, 6, generator=torch.Generator().manual_seed(int(row))) for row in rows])
    return {"images": embeddings[:, :4, :2].to(dtype), "prompt_embeds": embeddings.to(dtype), "row": rows}


def writer(folder, **changes):
    return CacheWriter(folder, **{"identity": IDENTITY, "rows": ROWS, "shard_rows": SHARD_ROWS, **changes})


def missing_from(cache):
    return [rows for shard in range(cache.num_shards) if (rows := cache.missing_of(shard)) is not None]


def write(folder, dtype=torch.float32):
    cache = writer(folder)
    for start, stop in missing_from(cache):
        cache.write(start, tensors(start, stop, dtype))
    cache.finish()
    return folder


@pytest.fixture
def folder(tmp_path):
    return write(tmp_path / "cache")


SHARD = "latents-00001.safetensors"


DAMAGES = pytest.mark.parametrize("how", ["delete", "truncate", "flip"])


# Reading


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_rows_come_back_to_the_bit(tmp_path, dtype):
    cached, expected = CachedLatents(write(tmp_path, dtype)), tensors(0, ROWS, dtype)
    assert len(cached) == ROWS
    for row in range(ROWS):
        item = cached[row]
        assert item.keys() == expected.keys()
        for name, tensor in item.items():
            assert tensor.dtype == expected[name].dtype and torch.equal(tensor, expected[name][row])
    assert torch.equal(cached[-1]["row"], torch.tensor(ROWS - 1))
    with pytest.raises(IndexError, match="22 rows; there is no row 22"):
        cached[ROWS]


def test_a_row_carries_its_seed_and_no_more_memory_than_its_own(folder):
    cached = CachedLatents(folder)
    assert set(cached[3]) == {"images", "prompt_embeds", "row"}
    item = cached[3, 2**62]
    assert item["seed"].item() == 2**62 and item["row"] == 3
    assert item["prompt_embeds"].untyped_storage().nbytes() == 5 * 6 * 4


def test_fields_and_identity_describe_the_cache(folder, tmp_path):
    cached = CachedLatents(folder)
    cached.check_first()
    assert cached.fields == {"images": (4, 2), "prompt_embeds": (5, 6), "row": ()}
    identity = cached.identity()
    assert identity["rows"] == ROWS and identity["made_from"] == {**IDENTITY, "size": [8, 8]}
    assert identity == CachedLatents(write(tmp_path / "again")).identity() == json.loads(json.dumps(identity))
    assert identity["digest"] != CachedLatents(write(tmp_path / "half", torch.float16)).identity()["digest"]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_read_a_cache_with_workers(folder, num_workers):
    cached, expected = CachedLatents(folder), tensors(0, ROWS)
    cached.check_first()  # opens a file, which workers must not take over
    batches = list(itertools.islice(iter(Batches(cached, 11, seed=0, num_workers=num_workers)), 2))
    assert sorted(torch.cat([batch["row"] for batch in batches]).tolist()) == list(range(ROWS))
    for batch in batches:
        assert torch.equal(batch["prompt_embeds"], expected["prompt_embeds"][batch["row"]])
        assert batch["seed"].shape == (11,)
    assert first_images(cached, 3)["row"].tolist() == [0, 1, 2]


def test_a_cache_is_pickled_without_its_files(folder):
    cached = CachedLatents(folder)
    cached.check_first()
    copy = pickle.loads(pickle.dumps(cached))
    assert not copy._opened and torch.equal(copy[9]["images"], cached[9]["images"])


@DAMAGES
def test_damaged_shard_is_named(folder, how):
    damage(folder / SHARD, how)
    with pytest.raises(CacheError, match=SHARD):
        CachedLatents(folder)


def test_without_verifying_sizes_alone_are_compared(folder):
    damage(folder / SHARD, "flip")
    CachedLatents(folder, verify=False)
    damage(folder / SHARD, "truncate")
    with pytest.raises(CacheError, match=f"{SHARD} has .* bytes"):
        CachedLatents(folder, verify=False)


@DAMAGES
def test_damaged_description_is_refused(folder, how):
    damage(folder / "latents.json", how)
    with pytest.raises(CacheError, match="latents.json"):
        CachedLatents(folder)


def test_altered_description_is_refused(folder):
    path = folder / "latents.json"
    path.write_text(path.read_text().replace('"sd"', '"xl"'))
    with pytest.raises(CacheError, match="latents.json is not what was written"):
        CachedLatents(folder)


def test_shard_that_goes_away_while_training_is_named(folder):
    cached = CachedLatents(folder)
    (folder / SHARD).unlink()
    with pytest.raises(CacheError, match=SHARD):
        cached[SHARD_ROWS]


# Writing


def test_files_are_nothing_but_safetensors_and_json(folder):
    assert sorted(path.name for path in folder.iterdir()) == [
        *(f"latents-{shard:05d}.{suffix}" for shard in range(3) for suffix in ("json", "safetensors")),
        "latents.json",
        "plan.json",
    ]
    assert (folder / SHARD).stat().st_mode == (folder / "plan.json").stat().st_mode


@DAMAGES
@pytest.mark.parametrize("suffix", ["safetensors", "json"])
def test_shards_that_are_missing_or_damaged_are_written_again(folder, how, suffix):
    whole = CachedLatents(folder).identity()
    damage(folder / f"latents-00001.{suffix}", how)
    cache = writer(folder)
    assert missing_from(cache) == [(8, 16)]
    cache.write(8, tensors(8, 16))
    assert missing_from(cache) == []
    cache.finish()
    assert CachedLatents(folder).identity() == whole


KILLED = """
import os, sys
from pathlib import Path
sys.path[:0] = sys.argv[3:]
import test_latent_cache as case
from cm_diffusers.training import checkpoints, latent_cache
real, left = getattr(os, sys.argv[2]), [4]
def dies(*arguments):
    left[0] -= 1
    if left[0] < 0:
        os._exit(9)
    return real(*arguments)
setattr(os, sys.argv[2], dies)
case.write(Path(sys.argv[1]))
"""


# The fourth flush makes the first shard's move lasting, the fourth move is that of the second shard.
@pytest.mark.parametrize(("at", "missing"), [("fsync", [(0, 8), (8, 16), (16, 22)]), ("replace", [(8, 16), (16, 22)])])
def test_a_killed_writer_goes_on(tmp_path, at, missing):
    cut = [sys.executable, "-c", KILLED, str(tmp_path / "cut"), at, *sys.path]
    assert subprocess.run(cut).returncode == 9
    with pytest.raises(CacheError, match="latents.json"):
        CachedLatents(tmp_path / "cut")
    cache = writer(tmp_path / "cut")
    assert missing_from(cache) == missing
    with pytest.raises(CacheError, match="lacks . shards"):
        cache.finish()
    whole = CachedLatents(write(tmp_path / "whole")).identity()
    assert CachedLatents(write(tmp_path / "cut")).identity() == whole
    assert not list((tmp_path / "cut").glob(".*"))


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("No space left on device")])
def test_a_full_disk_leaves_nothing_torn(tmp_path, monkeypatch, error):
    cache = writer(tmp_path)

    def fills_up(tensors, path):
        path.write_bytes(b"half of it")
        raise error

    monkeypatch.setattr(latent_cache, "save_file", fills_up)
    with pytest.raises(
        CacheError, match="latents-00000.safetensors cannot be written, .* MiB are free.*No space left"
    ):
        cache.write(0, tensors(0, 8))
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]


def test_another_identity_is_refused_naming_each_difference(folder):
    writer(folder)
    other = {**IDENTITY, "dataset": {"rows": ROWS, "digest": "xyz"}, "vae": "xl"}
    with pytest.raises(ValueError) as refused:
        writer(folder, identity=other, shard_rows=4)
    message = str(refused.value)
    assert "dataset's digest was 'abc' and is 'xyz'" in message and "vae was 'sd' and is 'xl'" in message
    assert "shard_rows was 8 and is 4" in message and "size" not in message


def test_shards_of_unknown_origin_are_not_adopted(folder):
    (folder / "plan.json").unlink()
    with pytest.raises(CacheError, match="holds latents, but not plan.json"):
        writer(folder)


def test_views_of_one_memory_are_written_apart(tmp_path):
    cache = CacheWriter(tmp_path, {}, rows=4)
    both = torch.randn(4, 6)
    cache.write(0, {"one": both[:, :2], "two": both[:, 2:], "all": both, "turned": both.view(4, 2, 3).mT})
    cache.finish()
    assert torch.equal(CachedLatents(tmp_path)[2]["turned"], both[2].view(2, 3).T)


def test_shards_must_be_alike(tmp_path):
    cache = writer(tmp_path)
    for start, stop in missing_from(cache):
        cache.write(start, tensors(start, stop, torch.float16 if start == 8 else torch.float32))
    with pytest.raises(CacheError, match="shard 1's images's dtype was 'float32' and is 'float16'"):
        cache.finish()


def test_what_does_not_fit_is_refused(tmp_path):
    cache = writer(tmp_path)
    for start in (-8, 3, 24):
        with pytest.raises(ValueError, match=f"`start` must be a multiple of 8 below 22, got {start}"):
            cache.write(start, tensors(0, 8))
    with pytest.raises(ValueError, match=r"`tensors\['images'\]` must have 6 rows, got the shape \(8, 4, 2\)"):
        cache.write(16, tensors(0, 8))
    with pytest.raises(ValueError, match="at least one tensor"):
        cache.write(0, {})
    with pytest.raises(ValueError, match="must not hold 'seed'"):
        cache.write(0, {"seed": torch.zeros(8)})
    with pytest.raises(ValueError, match="`rows` must be at least 1, got 0"):
        writer(tmp_path, rows=0)
    with pytest.raises(TypeError, match="`identity` must hold plain JSON values"):
        writer(tmp_path, identity={"dtype": torch.float32})
