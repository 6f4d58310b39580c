"""What a run has to say of itself when it is over: the facts of a model card."""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import json
import logging
import platform
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from accelerate import Accelerator

from cm_diffusers import __version__
from cm_diffusers.pipelines.loading import RECORD
from cm_diffusers.training.config import ConsistencyConfig
from cm_diffusers.training.runtime import precision
from cm_diffusers.training.teacher import Teacher

logger = logging.getLogger(__name__)

SAMPLES = "samples.png"
BESIDE = (RECORD, SAMPLES)  # a student, and made when it is saved
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
CHOICES = (
    "levels num_levels s0 s1 stages mapping_base level_distribution p_mean p_std source solver target mu mu_schedule "
    "distance weighting guidance_scale truncation first_stage_steps flow_map tangent_warmup_steps real_data "
    "adversarial_weight w_min w_max skip_interval lora_rank lora_alpha dora"
).split()
OPTIMISATION = (
    "optimizer learning_rate lr_schedule batch_size gradient_accumulation_steps max_grad_norm ema_half_life"
).split()


@dataclass
class TrainingRecord:
    """Facts of a run, as `training.json` beside the student holds them.

    Args:
        method (`str`): as in [`ConsistencyConfig`].
        choices (`dict`): the five choices of the method that were in force.
        optimisation (`dict`): optimiser, learning rate, batch and the like.
        conversion_steps, steps (`int`): of each phase that were taken.
        images (`int`): that were seen in all.
        skipped_steps (`int`): without a finite gradient.
        seconds (`float`): of training, over all resumes.
        hardware (`str`), processes (`int`), precision (`str`): what it ran on, and how.
        parameters (`int`): weights of the student.
        teacher (`dict`, *optional*): its `name`, `scheduler` and `license`.
        dataset (`dict`): its `name` and identity.
        seed (`int`): the run's.
        resolution (`int`, *optional*): height and width of the images in pixels, where the run was asked for one.
        versions (`dict[str, str]`): of the packages that matter.
        date (`str`): of the end.
    """

    method: str
    choices: dict[str, Any]
    optimisation: dict[str, Any]
    conversion_steps: int
    steps: int
    images: int
    skipped_steps: int
    seconds: float
    hardware: str
    processes: int
    precision: str
    parameters: int
    teacher: dict[str, Any] | None
    dataset: dict[str, Any]
    seed: int
    resolution: int | None = None
    versions: dict[str, str] = field(default_factory=lambda: package_versions())
    date: str = field(default_factory=lambda: time.strftime("%Y-%m-%d"))

    @classmethod
    def of_run(
        cls, config: ConsistencyConfig, teacher: Teacher | None, accelerator: Accelerator, student: Any,
        dataset_identity: dict[str, Any], **progress: Any,
    ) -> TrainingRecord:  # fmt: skip
        """The record of a run.

        Args:
            config, teacher, accelerator, dataset_identity: the run's.
            student: its network, whole.
            progress: the fields that count.
        """
        device, count = accelerator.device, accelerator.num_processes
        return cls(
            method=config.method, choices=_values(config, CHOICES), optimisation=_values(config, OPTIMISATION),
            hardware=hardware_name(device), processes=count, precision=precision(accelerator), seed=config.seed,
            resolution=config.resolution,
            parameters=sum(weight.numel() for weight in student.parameters()),
            teacher=None if teacher is None else describe_teacher(teacher),
            dataset={"name": public_name(config.dataset), **dataset_identity}, **progress,
        )  # fmt: skip

    def save(self, folder: Path) -> None:
        """Write it as JSON."""
        (folder / RECORD).write_text(json.dumps(dataclasses.asdict(self), indent=2) + "\n")

    @classmethod
    def load(cls, folder: Path) -> TrainingRecord | None:
        """The record in a student's folder, if there is one.

        Raises:
            `ValueError`: if it is not of this form.
        """
        if not (folder / RECORD).exists():
            return None
        try:
            return cls(**json.loads((folder / RECORD).read_text()))
        except (TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"{folder / RECORD} is no record of a training run: {error}") from error


def _values(config: ConsistencyConfig, names: Sequence[str]) -> dict[str, Any]:
    return {name: value for name in names if (value := getattr(config, name)) is not None}


def describe_teacher(teacher: Teacher) -> dict[str, Any]:
    """Its name, scheduler and licence."""
    return {
        "name": public_name(teacher.name), "scheduler": type(teacher.scheduler).__name__,
        "license": teacher_license(teacher.name),
    }  # fmt: skip


def public_name(source: str | None) -> str | None:
    """A Hub id, or the name of a folder, file or URL without its place."""
    if source is None or (HUB_ID.fullmatch(source) and not Path(source).exists()):
        return source
    return Path(urlsplit(source).path).resolve().name


def package_versions() -> dict[str, str]:
    others = ("diffusers", "torch", "accelerate", "datasets")
    return {"cm_diffusers": __version__} | {name: importlib.metadata.version(name) for name in others}


def hardware_name(device: torch.device) -> str:
    """What a person calls the device."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU" if device.type == "cpu" else device.type


@functools.cache
def teacher_license(name: str) -> str | None:
    """The licence that a teacher's repository or folder states, if it does."""
    from huggingface_hub import ModelCard

    place = Path(name) / "README.md" if Path(name).is_dir() else name
    if not HUB_ID.fullmatch(name) and not Path(place).is_file():
        return None  # a network in memory, or a folder without a card
    try:
        license_ = ModelCard.load(place, ignore_metadata_errors=True).data.get("license")
    except Exception as error:  # the Hub client raises what its transport does, too; the student matters more
        logger.warning("The licence of the teacher %s cannot be read: %s", name, error)
        return None
    # A name, and nothing that a card could be made to say.
    return license_ if isinstance(license_, str) and re.fullmatch(r"[\w.-]+", license_) else None
