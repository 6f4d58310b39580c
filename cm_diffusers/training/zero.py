"""DeepSpeed's ZeRO, as far as accelerate leaves it to us: its settings, and the state that it spreads over processes.

Stage 2 spreads gradients and moments, stage 3 the weights as well. Weights stay in float32 and mixed precision is
autocast, so that a run computes what it computes without DeepSpeed.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from cm_diffusers.training.config import ConsistencyConfig

SUPPORTED_STAGES = (2, 3)
MOMENTS = ("exp_avg", "exp_avg_sq")  # of Adam in all its forms


def stage(accelerator: Accelerator) -> int:
    return int(accelerator.deepspeed_plugin.zero_stage)


def configure(accelerator: Accelerator, config: ConsistencyConfig) -> None:
    """Give DeepSpeed the run's settings.

    Raises:
        `ValueError`: for a ZeRO stage, an offload or a precision that is not supported.
    """
    settings, found = accelerator.deepspeed_plugin.deepspeed_config, stage(accelerator)
    if found not in SUPPORTED_STAGES:
        raise ValueError(f"DeepSpeed's ZeRO works in stages 2 and 3 here, not in stage {found}: set `zero_stage`.")
    for place in ("offload_optimizer", "offload_param"):
        device = (settings["zero_optimization"].get(place) or {}).get("device") or "none"
        if device != "none":
            raise ValueError(f"`{place}_device: {device}` of DeepSpeed is not supported: set it to none.")
    precision = config.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision == "fp16":
        raise ValueError("DeepSpeed runs in bf16 or float32 here: set `mixed_precision` to bf16 or no.")
    settings |= {
        "train_micro_batch_size_per_gpu": config.batch_size,
        "gradient_accumulation_steps": config.gradient_accumulation_steps,
        "gradient_clipping": config.max_grad_norm or 0.0,
        "bf16": {"enabled": False},
        "fp16": {"enabled": False},
        # No module's gradients are to be summed in low precision.
        "torch_autocast": {
            "enabled": precision == "bf16", "dtype": "bfloat16", "lower_precision_safe_modules": [],
        },
    }  # fmt: skip


def precision(accelerator: Accelerator) -> str:
    """`"bf16"` or `"no"`."""
    return "bf16" if accelerator.deepspeed_plugin.deepspeed_config["torch_autocast"]["enabled"] else "no"


def autocast(accelerator: Accelerator) -> torch.autocast:
    """The context of a forward pass."""
    return torch.autocast(accelerator.device.type, torch.bfloat16, enabled=precision(accelerator) == "bf16")


def disconnect() -> None:
    """Let go of the process groups, which DeepSpeed would otherwise hold until the interpreter has shut down."""
    import deepspeed

    deepspeed.comm.destroy_process_group()


def partition(accelerator: Accelerator, network: nn.Module) -> None:
    """Spread a frozen network over the processes as stage 3 does, in place. It gathers each layer when it runs."""
    import deepspeed

    settings = {
        "train_micro_batch_size_per_gpu": 1,
        # Small weights would be kept whole, and would miss it when their parts change.
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    }
    deepspeed.initialize(model=network, config=settings)


def is_partitioned(tensor: Tensor) -> bool:
    """Whether this is a parameter of stage 3."""
    return hasattr(tensor, "ds_tensor")


def is_zero_optimizer(optimizer: Any) -> bool:
    """Whether this is DeepSpeed's wrapper of an optimiser, which is none of torch's."""
    return not isinstance(optimizer, torch.optim.Optimizer)


def whole_tensor(tensor: Tensor) -> Tensor:
    """A partitioned parameter, put together. Called by all processes."""
    from deepspeed.runtime.zero import GatheredParameters

    with GatheredParameters([tensor]):
        return tensor.detach().clone()


# State --------------------------------------------------------------------------------------------------------------


def whole_weights(network: nn.Module) -> dict[str, Tensor]:
    """Partitioned weights, whole, on the CPU. Called by all processes, filled on the main one."""
    weights = dict(network.named_parameters())
    whole = {}
    for name, value in network.state_dict().items():
        found = whole_tensor(weights[name]) if name in weights else value
        if _is_main():
            whole[name] = found.cpu()
    return whole


def whole_optimizer(network: nn.Module, optimizer: Any) -> dict[str, Any]:
    """The moments by the names of the weights, as torch's state dict has them. Called by all, filled on the main."""
    from deepspeed.utils import safe_get_full_optimizer_state

    inner, moments = optimizer.optimizer, {}
    if inner.state:  # it is empty until the first good step
        step = next(iter(inner.state.values()))["step"].cpu()
        for name, weight in _trained(network).items():
            moments[name] = {"step": step.clone()} if _is_main() else {}
            for key in MOMENTS:
                value = safe_get_full_optimizer_state(weight, key)
                if _is_main():
                    moments[name][key] = value.cpu()
    groups = [{**group, "params": list(_trained(network))} for group in inner.param_groups]
    return {"state": moments, "param_groups": groups}


def restore_weights(network: nn.Module, weights: dict[str, Tensor]) -> None:
    """Give partitioned weights their values, which only the main process has."""
    from deepspeed.runtime.zero import GatheredParameters

    for name, weight in network.named_parameters():
        with GatheredParameters([weight], modifier_rank=0):
            if weights:
                weight.data.copy_(weights[name])
    for name, buffer in network.named_buffers():
        if name in network.state_dict():
            buffer.copy_(_from_main(weights.get(name), buffer))


def restore_optimizer(network: nn.Module, optimizer: Any, moments: dict[str, dict[str, Tensor]]) -> None:
    """Take over the weights of `network`, and moments that only the main process has."""
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state
    from deepspeed.utils import safe_set_local_fp32_param as set_own_weight
    from deepspeed.utils import safe_set_local_optimizer_state as set_own_moment

    trained = _trained(network)
    _make_moments(optimizer, moments[next(iter(trained))]["step"] if moments else None)
    for name, weight in trained.items():
        partitioned = is_partitioned(weight)
        set_own_weight(weight, weight.ds_tensor) if partitioned else safe_set_full_fp32_param(weight, weight.data)
        for key in MOMENTS:
            like = torch.empty(weight.ds_shape if partitioned else weight.shape, device=weight.device)
            value = _from_main(moments[name][key] if moments else None, like)
            if partitioned:
                set_own_moment(weight, _part_of(value, weight), key)
            else:
                safe_set_full_optimizer_state(weight, value, key)


def _is_main() -> bool:
    return torch.distributed.get_rank() == 0


def _trained(network: nn.Module) -> dict[str, Any]:
    return {name: weight for name, weight in network.named_parameters() if weight.requires_grad}


def _make_moments(optimizer: Any, step: Tensor | None) -> None:
    """The inner optimiser's state as it is after a step, all zero, with the main process's number of steps."""
    stage_3 = hasattr(optimizer, "fp32_partitioned_groups_flat")
    flat = optimizer.fp32_partitioned_groups_flat if stage_3 else optimizer.single_partition_of_fp32_groups
    for part in flat:
        count = _from_main(step, torch.zeros((), device=part.device))
        optimizer.optimizer.state[part] = {"step": count, **{key: torch.zeros_like(part) for key in MOMENTS}}
    if not stage_3:
        optimizer._lazy_init_hp_params_optimizer_state()


def _from_main(value: Tensor | None, like: Tensor) -> Tensor:
    """The main process's `value`, on all of them; zero if it has none."""
    value = torch.zeros_like(like) if value is None else value.to(like)
    torch.distributed.broadcast(value, src=0)
    return value


def _part_of(value: Tensor, weight: Any) -> Tensor:
    """This process's part of a tensor, flat, and padded to the length of all parts as DeepSpeed's are."""
    size, rank, count = weight.ds_tensor.numel(), torch.distributed.get_rank(), torch.distributed.get_world_size()
    padded = nn.functional.pad(value.flatten(), (0, size * count - value.numel()))
    return padded.narrow(0, size * rank, size)
