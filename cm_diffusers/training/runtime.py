"""What a run stands on: a place to write to, accelerate, an optimiser, and networks laid out for speed."""

from __future__ import annotations

import copy
import tempfile
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import (
    DistributedType,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    ProjectConfiguration,
    broadcast_object_list,
    parse_flag_from_env,
)
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from torch import Tensor, nn

from cm_diffusers.training.config import ConsistencyConfig


def check_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"`output_dir` {str(folder)!r} cannot be written to: {error}") from error


def make_accelerator(config: ConsistencyConfig) -> Accelerator:
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
    if accelerator.distributed_type == DistributedType.MULTI_CPU and parse_flag_from_env("ACCELERATE_USE_FSDP"):
        _shard_on_cpu()
    if is_sharded(accelerator) and not accelerator.is_fsdp2:
        raise ValueError("Weights are sharded by FSDP2 only: set `fsdp_version: 2` in accelerate's config.")
    return accelerator


def _shard_on_cpu() -> None:
    """FSDP2 on CPUs, which torch can and accelerate leaves out: for trying a run out before it goes to GPUs."""
    for shared in (PartialState._shared_state, AcceleratorState._shared_state):
        shared["distributed_type"] = DistributedType.FSDP
    AcceleratorState._shared_state["fsdp_plugin"] = FullyShardedDataParallelPlugin()


def make_optimizer(config: ConsistencyConfig, unet: nn.Module) -> torch.optim.Optimizer:
    optimizer = {"radam": torch.optim.RAdam, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[config.optimizer]
    arguments: dict[str, Any] = {"foreach": True} if config.optimizer == "radam" else {"fused": True}
    betas = (config.adam_betas[0], config.adam_betas[1])
    return optimizer(
        unet.parameters(), lr=config.learning_rate, betas=betas, weight_decay=config.weight_decay, **arguments
    )


def take_step(optimizer: Any, bad: Tensor) -> None:
    """Step `optimizer`, unless `bad` is 1: then weights and moments stay as they are.

    Fused optimisers read `bad` on the device. RAdam, of which torch has no fused form, makes the host wait for it.

    Args:
        optimizer (`AcceleratedOptimizer`): as accelerate prepared it. With a scaler, it looks for itself.
        bad (`Tensor` of shape `()`): whether the gradient is not finite, on the device.
    """
    inner = optimizer.optimizer
    if optimizer.scaler is not None:
        optimizer.step()
    elif inner.defaults.get("fused"):
        inner.found_inf = bad.float()
        optimizer.step()
    elif not bad:
        optimizer.step()


def in_precision(teacher: nn.Module, config: ConsistencyConfig) -> nn.Module:
    """The teacher, or a copy of it, in `config.teacher_dtype`: the caller's own stays as it is."""
    dtype = getattr(torch, config.teacher_dtype)
    if all(parameter.dtype == dtype for parameter in teacher.parameters()):
        return teacher
    return nn.Module.to(copy.deepcopy(teacher), dtype)


def lay_out(config: ConsistencyConfig, network: nn.Module) -> nn.Module:
    """Give a network the memory format and the compilation of the config, in place; its weights keep their names."""
    if config.channels_last:
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if config.compile:
        network.compile(dynamic=False)
    return network


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


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether each process holds only a part of the weights."""
    return accelerator.distributed_type == DistributedType.FSDP


def shard_like_student(accelerator: Accelerator, network: nn.Module) -> None:
    """Spread a frozen copy of the student over the processes in the same parts, in place, if the student is."""
    if is_sharded(accelerator):
        sharded = fsdp2_prepare_model(accelerator, network)
        sharded.set_reshard_after_forward(True)  # no backward pass will do it
