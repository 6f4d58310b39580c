"""What a run would meet on this machine, found out before it starts: `cm-diffusers doctor`.

Weights are counted; what a batch keeps for its backward pass is measured on one image and on two, and follows a line
from there. So memory is known to be short before a step of full size is tried.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate.utils import gather_object, parse_flag_from_env
from torch import nn

from cm_diffusers.network_config import height_and_width
from cm_diffusers.pipelines.stored import suits_stock_pipeline
from cm_diffusers.training.config import ConsistencyConfig
from cm_diffusers.training.footprint import Footprint, Kept, bytes_of, bytes_of_gradients, gathered_at_once
from cm_diffusers.training.objectives.pairs import PairObjective
from cm_diffusers.training.preparation import load_teacher_of
from cm_diffusers.training.runtime import end_training
from cm_diffusers.training.saving import stored_scheduler
from cm_diffusers.training.sharding import is_sharded, uses_zero
from cm_diffusers.training.teacher import Teacher
from cm_diffusers.training.trainer import ConsistencyTrainer

PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "datasets", "huggingface_hub", "lpips", "safetensors")
# What a step uses for a while, and what lies unused between its pieces: measured peaks are below it.
WORKING_SPACE = 1.1
# Of a GPU, convolutions in float32 take this much more for themselves; measured: 0.4 GiB.
GPU_WORKSPACE = 2**29
TIMED_STEPS = 4
LONG_WAIT = 0.1  # part of a step
CONTROL_GROUP = Path("/sys/fs/cgroup")


@dataclass
class Diagnosis:
    """What was found.

    Args:
        lines (`list[str]`): the report.
        warnings (`list[str]`): what would go wrong.
        footprint ([`Footprint`], *optional*): memory of a step at the config's batch size, per process.
        bytes_free (`int`): memory that a process could use.
        seconds_per_step (`float`, *optional*): as measured; `None` if memory does not suffice to try.
    """

    lines: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    footprint: Footprint | None = None
    bytes_free: int = 0
    seconds_per_step: float | None = None

    def __str__(self) -> str:
        return "\n".join([*self.lines, *(f"WARNING: {warning}" for warning in self.warnings)])


def examine_machine() -> Diagnosis:
    """Versions, and devices with their memory."""
    found = Diagnosis([f"python       {platform.python_version()} on {platform.system()} {platform.machine()}"])
    for name in ("cm_diffusers", *PACKAGES):
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            version = "missing"
            found.warnings.append(f"{name} is not installed.")
        found.lines.append(f"{name:<12} {version}")
    memory = psutil.virtual_memory()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found.lines.append(
        f"cpu          {cores} cores, {torch.get_num_threads()} threads, {_size(memory.available)} of "
        f"{_size(memory.total)} free"
    )
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        properties = torch.cuda.get_device_properties(index)
        found.lines.append(
            f"cuda:{index}       {properties.name}, {_size(free)} of {_size(total)} free, bf16 "
            f"{'yes' if torch.cuda.is_bf16_supported() else 'no'}"
        )
    if torch.backends.mps.is_available():
        found.lines.append("mps          available")
    return found


def examine(config: ConsistencyConfig, teacher: Any = None, train_dataset: Any = None) -> Diagnosis:
    """Machine, teacher, dataset, memory and speed of a run. Nothing is written to its `output_dir`.

    Args:
        config ([`ConsistencyConfig`]): the run.
        teacher, train_dataset (*optional*): as for [`ConsistencyTrainer`].

    Raises:
        `ValueError`, `TypeError`: what the trainer would refuse.
    """
    found = examine_machine()
    disk = _nearest_folder(config.output_dir)
    with tempfile.TemporaryDirectory() as folder:
        name = config.hub_repository if config.push_to_hub else config.hub_model_id
        config = replace(config, output_dir=folder, tracker="none", resume=None, hub_model_id=name)
        source = config.teacher if teacher is None else teacher
        if source is not None:
            loaded = load_teacher_of(config, source)
            found.lines += _describe_teacher(loaded)
            teacher = (loaded.unet, loaded.scheduler) if loaded.text is None else loaded.text.pipeline
            if not _weights_fit(found, config, loaded):
                return found
        if config.dataset is None and train_dataset is None:
            found.lines.append("dataset      none given, so neither memory nor speed can be measured")
            return found
        trainer = ConsistencyTrainer(config, teacher, train_dataset)
        found.lines += _describe_run(trainer)
        _examine_teacher_on_images(found, trainer)
        _examine_memory(found, trainer)
        _examine_disk(found, trainer, disk)
        if not any(gather_object([bool(found.warnings)])):  # a step takes all processes
            _examine_speed(found, trainer)
        end_training(trainer.accelerator, trainer.student)
    return found


# Teacher and data ---------------------------------------------------------------------------------------------------


def _describe_teacher(teacher: Teacher) -> list[str]:
    config: Any = teacher.unet.config
    low, high = teacher.preconditioning.sigma_range
    prediction = getattr(teacher.scheduler.config, "prediction_type", None)
    size = " x ".join(map(str, height_and_width(config.sample_size))) if config.sample_size else "any size"
    classes = f", {config.num_class_embeds} classes" if config.num_class_embeds else ""
    return [
        f"teacher      {type(teacher.unet).__name__} of {_count(teacher.unet)} weights, images of "
        f"{config.in_channels} x {size}{classes}",
        f"             {type(teacher.scheduler).__name__}{f', {prediction}' if prediction else ''}: "
        f"{type(teacher.preconditioning).__name__}, sigma from {low:.4g} to {high:.4g}",
    ]


def _describe_run(trainer: ConsistencyTrainer) -> list[str]:
    config, student, scheduler = trainer.config, trainer.unet, trainer.scheduler.config
    identity = trainer.dataset_identity
    given = ", ".join(f"{name} of {' x '.join(map(str, shape))}" for name, shape in trainer.dataset.fields.items())
    size = f"{identity['rows']} images" if "rows" in identity else f"a stream of {identity['shards'] or '?'} shards"
    steps = ", then ".join(f"{phase.steps} of {phase.name}" for phase in trainer.phases)
    return [
        f"dataset      {size}, given as {given}",
        f"student      {_count(student)} weights, boundary {scheduler.boundary}, sigma from {scheduler.sigma_min:.4g} "
        f"to {scheduler.sigma_max:.4g}; loads in stock diffusers: {'yes' if _is_stock(trainer) else 'no'}",
        f"run          steps: {steps}; batch {trainer.global_batch_size} = {config.batch_size} x "
        f"{config.gradient_accumulation_steps} micro-steps x {trainer.accelerator.num_processes} processes on "
        f"{trainer.accelerator.device}, precision {trainer.accelerator.mixed_precision}",
    ]


def _is_stock(trainer: ConsistencyTrainer) -> bool:
    if trainer.text is None:
        return suits_stock_pipeline(trainer.unet, trainer.scheduler)
    return stored_scheduler(trainer.scheduler) is not trainer.scheduler


def _examine_teacher_on_images(found: Diagnosis, trainer: ConsistencyTrainer) -> None:
    try:
        report = trainer.check_teacher()
    except ValueError as error:
        found.warnings.append(str(error))
    else:
        found.lines += ["             its error on these images:", report.table()] if report else []


# Memory -------------------------------------------------------------------------------------------------------------


def _weights_fit(found: Diagnosis, config: ConsistencyConfig, teacher: Teacher) -> bool:
    """Whether there is room for all the copies of the weights; if not, nothing is moved to the device."""
    resolved = config.resolve(teacher.text is not None)
    in_float32 = 4 * sum(weight.numel() for weight in teacher.unet.parameters())
    # Student, average, gradients and two moments; beside them a target, and the student of a first stage.
    beside = (resolved.target == "ema" and bool(resolved.mu)) + (resolved.truncation is not None)
    copies = 0 if resolved.lora_rank else 5 + beside
    needed, free = copies * in_float32, _bytes_free(_device())
    if _device().type != "cpu":  # where the teacher is not yet
        needed += in_float32 * getattr(torch, config.teacher_dtype).itemsize // 4
    if needed > free and not any(map(parse_flag_from_env, ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"))):
        found.bytes_free = free
        found.warnings.append(
            f"Out of memory: the teacher and {copies} float32 copies of its weights need {_size(needed)}, and "
            f"{_size(free)} are free. Shard them over several GPUs with FSDP2."
        )
    return not found.warnings


def _examine_memory(found: Diagnosis, trainer: ConsistencyTrainer) -> None:
    footprint, per_image = measure_footprint(trainer)
    found.footprint = footprint
    # Weights and averages are there by now.
    there = footprint.student + footprint.teacher + footprint.averages + footprint.encoders
    found.bytes_free = _bytes_free(trainer.accelerator.device) + there
    rows = {
        "student": footprint.student,
        "teacher": footprint.teacher,
        "target and evaluation averages": footprint.averages,
        **({"encoders of text and pictures": footprint.encoders} if footprint.encoders else {}),
        "gradients": footprint.gradients,
        "optimiser": footprint.optimizer,
        f"activations of {trainer.config.batch_size} images": footprint.activations,
    }
    found.lines.append("memory       of one process, at the most:")
    found.lines += [f"             {_size(size):>10}  {name}" for name, size in rows.items()]
    needed = _with_working_space(footprint.total, trainer.accelerator.device)
    found.lines.append(
        f"             {_size(needed):>10}  with working space, of {_size(found.bytes_free)} that can be had"
    )
    if needed > found.bytes_free:
        weights = footprint.total - footprint.activations
        room = (found.bytes_free - _with_working_space(weights, trainer.accelerator.device)) / WORKING_SPACE
        largest = int(room / per_image) if room > 0 else 0
        found.warnings.append(_advice(trainer, needed, found.bytes_free, largest))


def _with_working_space(held: int, device: torch.device) -> int:
    """The bytes that have to be free for a step that holds so many."""
    return int(held * WORKING_SPACE) + (GPU_WORKSPACE if device.type == "cuda" else 0)


def _advice(trainer: ConsistencyTrainer, needed: int, free: int, largest: int) -> str:
    config, start = trainer.config, f"Out of memory: a step needs {_size(needed)}, and {_size(free)} can be had."
    if largest < 1:
        return f"{start} Not even one image fits: shard the networks with FSDP2, or take `gradient_checkpointing`."
    micro = -(-config.batch_size * config.gradient_accumulation_steps // largest)
    more = "" if config.gradient_checkpointing else ", or take `gradient_checkpointing`"
    return (
        f"{start} {largest} images fit: set `batch_size: {largest}` and `gradient_accumulation_steps: {micro}`{more}."
    )


def measure_footprint(trainer: ConsistencyTrainer) -> tuple[Footprint, float]:
    """The memory of a step at the config's batch size, and the part of it that one more image takes, in bytes.

    Forward passes are made, of one image and of two.
    """
    batch = next(iter(trainer.batches))
    sizes = (1, 2) if len(batch["seed"]) > 1 else (1,)
    kept = [_bytes_kept(trainer, {name: value[:size] for name, value in batch.items()}) for size in sizes]
    per_image = float(kept[1] - kept[0]) if len(kept) > 1 else float(kept[0])
    teacher = None if trainer.teacher is None else trainer.teacher.unet
    gradients = bytes_of_gradients(trainer.student)
    moments = 2 * gradients
    if uses_zero(trainer.accelerator) and not is_sharded(trainer.accelerator):  # a part, and the weights they move
        moments = 3 * gradients // trainer.accelerator.num_processes
    footprint = Footprint(
        student=bytes_of(trainer.student, beside=teacher),
        teacher=bytes_of(teacher),
        averages=bytes_of(*trainer.averages.networks().values(), beside=teacher),
        encoders=0 if trainer.text is None else bytes_of(*trainer.text.modules),
        gradients=gradients,
        optimizer=moments,
        activations=int(kept[0] + per_image * (trainer.config.batch_size - 1)),
    )
    if is_sharded(trainer.accelerator):
        # What is kept of one image holds every layer gathered, of which a few are at a time.
        footprint.activations = int(per_image * trainer.config.batch_size) + gathered_at_once(trainer.unet)
    return footprint, max(per_image, 1.0)


def _bytes_kept(trainer: ConsistencyTrainer, batch: dict[str, torch.Tensor]) -> int:
    phase = trainer.phases[-1]
    networks: list[nn.Module] = [trainer.student]
    objective: Any = phase.objective
    while hasattr(objective, "objective"):  # a term on top of another
        objective = objective.objective
    if isinstance(objective, PairObjective) and isinstance(objective.distance, nn.Module):
        networks.append(objective.distance)
    if trainer.teacher is not None:
        networks.append(trainer.teacher.unet)
    batch = trainer.stepper.to_device(batch)
    with Kept(*networks).counting() as kept:
        trainer.stepper.losses(phase, phase.start, batch)
    if not trainer.config.gradient_checkpointing:
        return kept.bytes
    trainer.unet.disable_gradient_checkpointing()
    with Kept(*networks).counting() as everything, everything.by_block(trainer.unet) as blocks:
        trainer.stepper.losses(phase, phase.start, batch)
    trainer.unet.enable_gradient_checkpointing()
    return kept.bytes + max(blocks.values(), default=0)  # one block at a time is computed again


def _device() -> torch.device:
    """The one that accelerate will choose."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return found or torch.device("cpu")


def _bytes_free(device: torch.device) -> int:
    """What a process may still use; processes of one machine share its memory."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0] + unused)
    free = min(psutil.virtual_memory().available, _bytes_free_in_container())
    return int(free // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def _bytes_free_in_container() -> int:
    """What Linux's control group leaves; a container sees the memory of its whole host otherwise."""
    try:
        limit, used = (int((CONTROL_GROUP / name).read_text()) for name in ("memory.max", "memory.current"))
    except (OSError, ValueError):  # there is none, or its limit is "max"
        return sys.maxsize
    return max(limit - used, 0)


# Disk and speed -----------------------------------------------------------------------------------------------------


def _examine_disk(found: Diagnosis, trainer: ConsistencyTrainer, disk: str) -> None:
    assert found.footprint is not None
    parts = 3 * found.footprint.student + found.footprint.averages  # the student's weights and its two moments
    shared = trainer.accelerator.num_processes if is_sharded(trainer.accelerator) else 1
    # One more is there while it is written.
    needed = parts * shared * (trainer.config.checkpoint_limit + 1)
    free = shutil.disk_usage(disk).free
    found.lines.append(
        f"disk         {_size(needed)} for {trainer.config.checkpoint_limit} checkpoints and the next, of "
        f"{_size(free)} free"
    )
    if needed > free:
        found.warnings.append(f"The disk is too small: checkpoints need {_size(needed)}, and {_size(free)} are free.")


def _nearest_folder(path: str) -> str:
    folder = os.path.abspath(path)
    while not os.path.isdir(folder):
        folder = os.path.dirname(folder)
    return folder


def _examine_speed(found: Diagnosis, trainer: ConsistencyTrainer) -> None:
    batches, phase = iter(trainer.batches), trainer.phases[-1]
    trainer.step, start = phase.start, 0.0
    on_gpu = trainer.accelerator.device.type == "cuda"
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    for index in range(TIMED_STEPS + 1):
        if index == 1:  # the first one warms up
            _wait_for(trainer.accelerator.device)
            trainer.meter.clock.read()
            start = time.perf_counter()
        trainer.advance(phase, batches)
    _wait_for(trainer.accelerator.device)
    seconds = (time.perf_counter() - start) / TIMED_STEPS
    batches.close()
    found.seconds_per_step = seconds
    parts = {name: spent / TIMED_STEPS for name, spent in trainer.meter.clock.read().items()}
    shares = ", ".join(f"{name} {100 * spent / seconds:.0f} %" for name, spent in parts.items())
    images = trainer.global_batch_size / seconds
    found.lines += [
        f"speed        {_duration(1000 * seconds)} for 1,000 steps, {images:.0f} images/s ({shares})",
        f"             {_duration(trainer.config.max_train_steps * seconds)} for the {trainer.config.max_train_steps} "
        f"steps of {phase.name}",
    ]
    if parts.get("data", 0.0) > LONG_WAIT * seconds:
        workers = trainer.config.num_workers
        found.lines.append(f"             A step waits for its images: raise `num_workers`, now {workers}.")
    if on_gpu:
        found.lines.append(f"peak         {_size(torch.cuda.max_memory_allocated())} of memory in these steps")


def _wait_for(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


# Words --------------------------------------------------------------------------------------------------------------


def _size(size: float) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


def _count(network: Any) -> str:
    weights = sum(parameter.numel() for parameter in network.parameters())
    return f"{weights / 1e6:.1f} M" if weights >= 1e6 else f"{weights / 1e3:.1f} k"


def _duration(seconds: float) -> str:
    for unit, length in (("days", 86_400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.1f} seconds"
