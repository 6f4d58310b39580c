"""Folders that are written beside their place and moved there: who looks finds the old or the new."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn

from cm_diffusers.networks import copy_in, networks_of
from cm_diffusers.pipelines.stored import StoredPipeline
from cm_diffusers.schedulers import ConsistencyScheduler
from cm_diffusers.training.lora import save_adapters

PARTIAL = ".student-"


@contextlib.contextmanager
def workplace(folder: Path) -> Iterator[Path]:
    """A folder within another for what is half done, deleted at the end."""
    place = Path(tempfile.mkdtemp(prefix=PARTIAL, dir=folder))
    try:
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)


def clean(folder: Path) -> None:
    """Delete the workplaces of processes that were killed."""
    for place in folder.glob(f"{PARTIAL}*"):
        shutil.rmtree(place, ignore_errors=True)


def stored_scheduler(scheduler: ConsistencyScheduler) -> Any:
    """The scheduler that a text-to-image student is saved with: an `LCMScheduler` where that samples alike."""
    config = scheduler.config
    if config.boundary != "lcm" or config.original_inference_steps is None or config.few_step_sigmas is not None:
        return scheduler
    try:
        return scheduler.to_lcm()
    except ValueError:  # of something else that it does not know
        return scheduler


def save_student(pipeline: Any, folder: Path) -> None:
    """Save a student: its pipeline, or its adapters alone where it has any, with its scheduler.

    A pipeline of stock diffusers is saved under its `LCMScheduler` where that samples alike.
    """
    if isinstance(pipeline, StoredPipeline):
        pipeline.save_pretrained(folder)
        return
    stock = stored_scheduler(pipeline.scheduler)
    if hasattr(pipeline.unet, "peft_config"):
        save_adapters(pipeline, folder)
        stock.save_pretrained(folder / "scheduler")
        return
    stored = {**in_one_precision(pipeline), "scheduler": stock}
    before = {name: getattr(pipeline, name) for name in stored}
    try:
        pipeline.register_modules(**stored)
        pipeline.unet.register_to_config(_name_or_path="")
        pipeline.save_pretrained(folder)
    finally:
        pipeline.register_modules(**before)


def in_one_precision(pipeline: Any) -> dict[str, nn.Module]:
    """Copies, in its network's precision, of a pipeline's parts in another: loaded as they are, they would not fit."""
    dtype = pipeline.unet.dtype
    return {name: copy_in(part, dtype) for name, part in networks_of(pipeline).items() if part.dtype != dtype}


def save_into(pipeline: Any, folder: Path) -> None:
    """Save a student's parts into a folder that may hold other things, too."""
    with workplace(folder) as place:
        save_student(pipeline, place)
        for part in sorted(place.iterdir()):
            old = folder / part.name
            if old.is_dir():
                shutil.rmtree(old)
            os.replace(part, old)
