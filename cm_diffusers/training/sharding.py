"""Weights of which each process holds a part: by torch's FSDP2, or by DeepSpeed's ZeRO."""

from __future__ import annotations

from accelerate import Accelerator, DeepSpeedPlugin, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, parse_flag_from_env
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from torch import Tensor, nn
from torch import __version__ as torch_version
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy

from cm_diffusers.training import zero
from cm_diffusers.training.config import ConsistencyConfig


def prepare_sharding(accelerator: Accelerator, config: ConsistencyConfig) -> None:
    """Fit what accelerate was told about sharding to the run, before anything is prepared.

    Raises:
        `ValueError`: for ways to shard that are not supported.
    """
    if accelerator.distributed_type == DistributedType.MULTI_CPU:
        _shard_on_cpu()
    if accelerator.distributed_type == DistributedType.FSDP and not accelerator.is_fsdp2:
        raise ValueError(
            "FSDP shards weights in its second version only: set `fsdp_version: 2` in accelerate's config."
        )
    elif accelerator.distributed_type == DistributedType.FSDP:
        if not hasattr(FSDPModule, "set_reshard_after_forward"):
            raise ValueError(f"FSDP needs torch 2.8, which shards what has no gradient, too; got {torch_version}.")
        # FSDP's own mixed precision would round noise levels and sum gradients in bf16. Autocast does neither.
        accelerator.state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy(cast_forward_inputs=False)
    elif uses_zero(accelerator):
        zero.configure(accelerator, config)
    if config.channels_last and (is_sharded(accelerator) or uses_zero(accelerator)):
        raise ValueError("`channels_last` does not go with FSDP and DeepSpeed, which lay weights out themselves.")
    if config.lora_rank and (is_sharded(accelerator) or uses_zero(accelerator)):
        raise ValueError("`lora_rank` does not go with FSDP and DeepSpeed: there is little left to share out.")


def _shard_on_cpu() -> None:
    """Sharding on CPUs, which accelerate leaves out: to try a run out before it gets GPUs."""
    if parse_flag_from_env("ACCELERATE_USE_FSDP"):
        distributed_type = DistributedType.FSDP
        plugin = FullyShardedDataParallelPlugin()
        if (precision := AcceleratorState().mixed_precision) != "no":
            plugin.set_mixed_precision(precision)
        AcceleratorState._shared_state["fsdp_plugin"] = plugin
    elif parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"):
        distributed_type = DistributedType.DEEPSPEED
        zero_plugin = DeepSpeedPlugin()
        zero_plugin.set_mixed_precision("no")
        zero_plugin.select(_from_accelerator_state=True)
        AcceleratorState._shared_state["deepspeed_plugins"] = zero_plugin
    else:
        return
    for shared in (PartialState._shared_state, AcceleratorState._shared_state):
        shared["distributed_type"] = distributed_type


def uses_zero(accelerator: Accelerator) -> bool:
    """Whether DeepSpeed runs the training."""
    return accelerator.distributed_type == DistributedType.DEEPSPEED


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether each process holds only a part of the weights."""
    if uses_zero(accelerator):
        return zero.stage(accelerator) == 3
    return accelerator.distributed_type == DistributedType.FSDP


def shard_like_student(accelerator: Accelerator, network: nn.Module) -> None:
    """Spread a frozen copy of the student over the processes in the same parts, in place, if the student is."""
    if not is_sharded(accelerator):
        return
    if uses_zero(accelerator):
        zero.partition(accelerator, network)
    else:
        sharded = fsdp2_prepare_model(accelerator, network)
        sharded.set_reshard_after_forward(True)  # no backward pass will do it


def own_part(tensor: Tensor) -> Tensor:
    """This process's part of a tensor, or the tensor, if it is not sharded."""
    if hasattr(tensor, "to_local"):
        return tensor.to_local()  # type: ignore[no-any-return]
    return getattr(tensor, "ds_tensor", tensor)


def whole_tensor(tensor: Tensor) -> Tensor:
    """A tensor put together from the parts of all processes, or itself. Called by all of them."""
    if hasattr(tensor, "full_tensor"):
        return tensor.full_tensor()  # type: ignore[no-any-return]
    return zero.whole_tensor(tensor) if zero.is_partitioned(tensor) else tensor
