"""What a run stands on: a place to write to, accelerate, and networks laid out for speed."""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import (
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    ProjectConfiguration,
    broadcast_object_list,
    gather_object,
    is_deepspeed_available,
)
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm.auto import tqdm

from cm_diffusers.network_config import height_and_width
from cm_diffusers.networks import copy_in
from cm_diffusers.training import zero
from cm_diffusers.training.config import ConsistencyConfig
from cm_diffusers.training.sharding import prepare_sharding, uses_zero


def check_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"`output_dir` {str(folder)!r} cannot be written to: {error}") from error


def make_accelerator(config: ConsistencyConfig) -> Accelerator:
    # Their functions keep a process group as a default value, for ever, if there is one when they are imported.
    import torch.distributed.nn

    if is_deepspeed_available():
        import deepspeed  # noqa: F401
    if torch.cuda.is_available():
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = config.allow_tf32
    accelerator = Accelerator(
        # accelerate takes the processes that torchrun starts on CPUs for as many runs of one, unless it is told.
        cpu=not torch.accelerator.is_available(),
        mixed_precision=config.mixed_precision,
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            num_steps=config.gradient_accumulation_steps, sync_with_dataloader=False
        ),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(seconds=config.distributed_timeout))],
        log_with=None if config.tracker == "none" else config.tracker,
        project_config=ProjectConfiguration(project_dir=config.output_dir, logging_dir=f"{config.output_dir}/logs"),
    )
    prepare_sharding(accelerator, config)
    return accelerator


def autocast(accelerator: Accelerator) -> AbstractContextManager[None]:
    """The context of forward passes in the run's precision."""
    return zero.autocast(accelerator) if uses_zero(accelerator) else accelerator.autocast()


def precision(accelerator: Accelerator) -> str:
    """`"no"`, `"bf16"` or `"fp16"`: what passes forward are computed in."""
    return zero.precision(accelerator) if uses_zero(accelerator) else str(accelerator.mixed_precision)


def end_training(accelerator: Accelerator, student: nn.Module) -> None:
    """Close trackers, and the processes' connections. Called by all processes.

    Connections have threads, which end when nothing refers to their process group any more, and may abort a process
    whose interpreter shuts down before: gloo's let go of the tensors of an exchange a moment after it has ended. A
    barrier, which has no tensors, and a second give that moment to those that stay, as sharded networks' do.
    """
    accelerator.wait_for_everyone()
    if uses_zero(accelerator):
        zero.disconnect()
    if isinstance(student, DistributedDataParallel):
        for holder in ("reducer", "logger", "process_group"):
            setattr(student, holder, None)
    accelerator.end_training()
    _outlast_connections()


def disconnect(processes: PartialState) -> None:
    """Close the connections of processes without a training, for the reason that [`end_training`] gives."""
    processes.wait_for_everyone()
    processes.destroy_process_group()
    _outlast_connections()


def _outlast_connections() -> None:
    deadline = time.monotonic() + 1.0
    while any("gloo" in name for name in thread_names()) and time.monotonic() < deadline:
        time.sleep(0.01)


def thread_names() -> list[str]:
    """Of this process; none where the system does not tell."""
    found = []
    for file in Path("/proc/self/task").glob("*/comm"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            found.append(file.read_text().strip())
    return found


def in_precision(teacher: nn.Module, config: ConsistencyConfig) -> nn.Module:
    """The teacher, or a copy of it, in `config.teacher_dtype`: the caller's own stays as it is."""
    dtype = getattr(torch, config.teacher_dtype)
    if all(parameter.dtype == dtype for parameter in teacher.parameters()):
        return teacher
    return copy_in(teacher, dtype)


def lay_out(config: ConsistencyConfig, network: nn.Module, in_parts: bool = False) -> nn.Module:
    """Give a network the memory format and the compilation of the config, in place; its weights keep their names.

    A network `in_parts` is not compiled: the hooks that gather its weights would break every graph.
    """
    if config.channels_last:
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if config.compile and not in_parts:
        network.compile(dynamic=False)
    return network


def settle(student: nn.Module, batch_size: int, device: torch.device) -> None:
    """Let DDP find the order in which it will sum gradients, from one pass, so that a resumed run sums as before."""
    if not isinstance(student, DistributedDataParallel):
        return
    config: Any = student.module.config
    images = torch.zeros(batch_size, config.in_channels, *height_and_width(config.sample_size), device=device)
    times = torch.zeros(batch_size, device=device)
    output = student(images, times, return_dict=False, **_told_nothing(config, times))[0]
    output.float().mean().backward()
    student.zero_grad()


def _told_nothing(config: Any, times: Tensor) -> dict[str, Any]:
    """Conditioning of the right shapes for a batch."""
    count = len(times)
    told: dict[str, Any] = {}
    if config.get("num_class_embeds") or config.get("class_embed_type"):
        told["class_labels"] = torch.zeros(count, dtype=torch.long, device=times.device)
    if config.get("cross_attention_dim"):
        told["encoder_hidden_states"] = times.new_zeros(count, 1, config.cross_attention_dim)
    if config.get("time_cond_proj_dim"):
        told["timestep_cond"] = times.new_zeros(count, config.time_cond_proj_dim)
    if config.get("addition_embed_type") == "text_time":
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        told["added_cond_kwargs"] = {
            "text_embeds": times.new_zeros(count, pooled), "time_ids": times.new_zeros(count, 6),
        }  # fmt: skip
    return told


def on_main(accelerator: Accelerator, work: Any) -> Any:
    """The result of `work()`, done by the main process, on all of them; what it raises, all raise.

    The result has to be small: it is sent as an object.
    """
    box: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            box[0] = work()
        except Exception as error:
            box[1] = error
    if accelerator.num_processes > 1:
        broadcast_object_list(box)
    if box[1] is not None:
        raise box[1]
    return box[0]


def in_turns(processes: Any, count: int, work: Callable[[int], Any], description: str) -> list[Any]:
    """The results of `work` on 0 to `count - 1`, on all processes; what it raises on one, all raise.

    The processes do one each at a time: none waits for another longer than one takes. Results have to be small.

    Args:
        processes (`Accelerator` or `PartialState`): all of which call this.
        count (`int`): how many there are.
        work (`Callable[[int], Any]`): on one of them.
        description (`str`): of the progress bar.
    """
    found: list[Any] = []
    turns = range(0, count, processes.num_processes)
    for first in tqdm(turns, desc=description, leave=False, disable=not processes.is_main_process):
        result, failed, mine = None, None, first + processes.process_index
        try:
            result = work(mine) if mine < count else None
        except Exception as error:
            failed = error
        for one, failure in gather_object([(result, failed)]):
            if failure is not None:
                raise failure
            found.append(one)
    return found[:count]
