"""Latents and prompt embeddings of a captioned dataset, computed once for all runs that are trained on them."""

from __future__ import annotations

import functools
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from cm_diffusers.training.config import ConsistencyConfig
from cm_diffusers.training.data import MappedImages, prepare_dataset
from cm_diffusers.training.latent_cache import CachedLatents, CacheWriter
from cm_diffusers.training.loading import SAMPLE, first_images
from cm_diffusers.training.preparation import identify, load_data, picture_spec
from cm_diffusers.training.randomness import mixed
from cm_diffusers.training.runtime import check_writable, in_turns, on_main
from cm_diffusers.training.teacher import load_teacher
from cm_diffusers.training.text_cache import origin
from cm_diffusers.training.text_to_image import TextToImage

logger = logging.getLogger(__name__)

DTYPES = ("float32", "float16", "bfloat16")
# A shard is in memory as a whole, a few times over, before it is written, and is what a killed process loses.
SHARD_BYTES, MOST_SHARD_ROWS = 256 * 2**20, 1024

Encode = Callable[[Mapping[str, Any]], dict[str, Tensor]]
Shards = Sequence[tuple[int, int]]


def precompute(
    config: ConsistencyConfig, teacher: Any = None, train_dataset: Any = None, cache_dtype: str = "float32"
) -> Path:
    """Write a cache of a captioned dataset, for text-to-image runs with `dataset: <the folder of the cache>`.

    Called again after it was killed, it goes on where it was. Several processes share the work.

    A row has one crop, one side and one caption. Where they are random, the seed and the row decide them.

    Args:
        config ([`ConsistencyConfig`]): the teacher, the data, `resolution`, `seed` and `teacher_dtype`, and how much
            is computed at once; `output_dir` is the folder of the cache. The rest of it has no effect.
        teacher, train_dataset (*optional*): as for [`ConsistencyTrainer`]. The dataset must have a length.
        cache_dtype (`str`): of latents and embeddings: `"float32"`, `"float16"` or `"bfloat16"`.

    Returns:
        `Path`: the folder of the cache.

    Raises:
        `TypeError`, `ValueError`: for a teacher or a dataset that cannot work, or a folder with another cache.
        `FloatingPointError`: for a row that is not finite, naming it.
        [`~cm_diffusers.training.latent_cache.CacheError`]: if it cannot be written. What is there already stays.
    """
    if cache_dtype not in DTYPES:
        raise ValueError(f"`cache_dtype` must be one of {', '.join(DTYPES)}, got {cache_dtype!r}.")
    folder = Path(config.output_dir).expanduser()
    check_writable(folder)
    processes = _processes(config)
    name, text = _load_text(config, teacher)
    dataset = _prepare(config, train_dataset, text, processes)
    made_from = origin(config, name, text, dataset.transform, identify(dataset), cache_dtype)
    text.prepare(processes.device, getattr(torch, config.teacher_dtype))
    encode = functools.partial(_encode, text, processes.device, getattr(torch, cache_dtype))
    bytes_of_a_row = sum(tensor.nbytes for tensor in encode(first_images(dataset, 1)).values())
    open_writer = functools.partial(CacheWriter, folder, made_from, len(dataset), _rows_of_a_shard(bytes_of_a_row))
    on_main(processes, lambda: open_writer().plan)  # begun by one
    writer = open_writer()
    missing = [rows for rows in in_turns(processes, writer.num_shards, writer.missing_of, "cache") if rows is not None]
    if processes.is_main_process:
        _announce(folder, missing, bytes_of_a_row)
    shards = missing[processes.process_index :: processes.num_processes]
    with tqdm(total=_count(shards), desc="precompute", disable=not processes.is_main_process) as bar:
        _write(writer, shards, _encoded(dataset, shards, config, encode, bar))
    processes.wait_for_everyone()
    on_main(processes, writer.finish)
    processes.wait_for_everyone()  # gloo is not done with an exchange when that returns; see `end_training`
    return folder


# Preparation --------------------------------------------------------------------------------------------------------


def _processes(config: ConsistencyConfig) -> PartialState:
    """All of them, of which there may be several on CPUs, too. They wait for the slowest in the end."""
    timeout = timedelta(seconds=config.distributed_timeout)
    return PartialState(cpu=not torch.accelerator.is_available(), timeout=timeout)


def _load_text(config: ConsistencyConfig, teacher: Any) -> tuple[str, TextToImage]:
    """The teacher's name and its encoders."""
    source = config.teacher if teacher is None else teacher
    if source is None:
        raise ValueError("Latents and prompt embeddings are a `teacher`'s: set it.")
    loaded = load_teacher(source, config.teacher_revision, dtype=torch.float16)  # its network is not asked
    if loaded.text is None:
        raise ValueError(f"`teacher` must make images of text, and {loaded.name} does not.")
    return loaded.name, loaded.text


def _prepare(config: ConsistencyConfig, dataset: Any, text: TextToImage, processes: PartialState) -> MappedImages:
    stream = "A cache has rows, and cannot be made of a stream"
    if config.streaming:
        raise ValueError(f"{stream}: leave `streaming` off.")
    dataset = load_data(config, processes) if dataset is None else dataset
    if isinstance(dataset, CachedLatents):
        raise ValueError(f"`dataset` is a cache already: {dataset.folder}.")
    prepared = prepare_dataset(
        dataset, picture_spec(config, text), image_column=config.image_column, caption_column=config.caption_column,
        captioned=True, on_bad_image=config.on_bad_image,
    )  # fmt: skip
    if not isinstance(prepared, MappedImages):
        raise ValueError(f"{stream}: `train_dataset` must have a length, got {type(dataset).__name__}.")
    return prepared


def _rows_of_a_shard(bytes_of_a_row: int) -> int:
    """A power of two, into which most batches fit without a remainder."""
    most = max(1, min(MOST_SHARD_ROWS, SHARD_BYTES // bytes_of_a_row))
    return int(1 << (most.bit_length() - 1))


def _announce(folder: Path, missing: Shards, bytes_of_a_row: int) -> None:
    rows, free = _count(missing), shutil.disk_usage(folder).free
    needed = rows * bytes_of_a_row
    logger.info("%d rows of %d bytes are to be computed.", rows, bytes_of_a_row)
    if needed > free:
        logger.warning("They need %.1f GiB, and %.1f GiB are free in %s.", needed / 2**30, free / 2**30, folder)


def _count(shards: Shards) -> int:
    return sum(stop - start for start, stop in shards)


# The work -----------------------------------------------------------------------------------------------------------


def _encoded(
    dataset: MappedImages, shards: Shards, config: ConsistencyConfig, encode: Encode, bar: tqdm
) -> Iterator[dict[str, Tensor]]:
    """The rows of some shards, in batches of which none reaches into two shards."""
    loader = DataLoader(
        dataset, batch_sampler=_batches(shards, config.batch_size, config.seed), num_workers=config.num_workers,
        pin_memory=torch.cuda.is_available(),
    )  # fmt: skip
    for batch in loader:
        encoded = encode(batch)
        bar.update(len(batch["seed"]))
        yield encoded


def _batches(shards: Shards, batch_size: int, seed: int) -> Iterator[list[tuple[int, int]]]:
    for start, stop in shards:
        for first in range(start, stop, batch_size):
            yield [(row, mixed(SAMPLE, seed, row)) for row in range(first, min(first + batch_size, stop))]


def _encode(
    text: TextToImage, device: torch.device, dtype: torch.dtype, batch: Mapping[str, Any]
) -> dict[str, Tensor]:
    """What is stored of a batch, on the CPU."""
    mean, std = text.posterior(batch["images"].to(device, non_blocking=True))
    found = {"latent_mean": mean, "latent_std": std, **text.encode_prompts(batch["captions"])}
    return {name: value.to("cpu", dtype) for name, value in found.items()} | {"sizes": batch["sizes"]}


def _write(writer: CacheWriter, shards: Shards, encoded: Iterator[dict[str, Tensor]]) -> None:
    for start, stop in shards:
        parts: list[dict[str, Tensor]] = []
        while sum(len(part["sizes"]) for part in parts) < stop - start:
            parts.append(next(encoded))
        tensors = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        _check_finite(tensors, start)
        writer.write(start, tensors)


def _check_finite(tensors: Mapping[str, Tensor], start: int) -> None:
    for name, tensor in tensors.items():
        bad = tensor.flatten(1).isfinite().all(1).logical_not().nonzero()
        if len(bad):
            raise FloatingPointError(
                f"The {name} of row {start + int(bad[0])} is not finite: set `teacher_dtype` and `cache_dtype` to "
                "what has room for it, as float32."
            )
