"""The state of a run, whole and independent of how it is spread over processes.

Weights, averages and the optimiser's moments are gathered to the main process under the names of the parameters, and
given back to however many processes there are; nothing is pickled.
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from cm_diffusers.training import zero
from cm_diffusers.training.lora import is_adapter

OPTIMIZER = "optimizer"


def _options(**more: Any) -> StateDictOptions:
    return StateDictOptions(full_state_dict=True, cpu_offload=True, **more)


def whole_weights(network: nn.Module) -> dict[str, Tensor]:
    """The weights of a network, sharded or not, on the CPU; of one with adapters, theirs alone.

    Called by all processes, filled on the main one.
    """
    if hasattr(network, "peft_config"):
        return {name: value.detach().cpu() for name, value in network.state_dict().items() if is_adapter(name)}
    if not any(map(zero.is_partitioned, network.parameters())):
        weights: dict[str, Any] = get_model_state_dict(network, options=_options())
        return weights
    return zero.whole_weights(network)


def whole_optimizer(student: nn.Module, optimizer: Any) -> dict[str, Any]:
    """The optimiser's state by the names of the parameters, on the CPU. Called by all, filled on the main process."""
    if zero.is_zero_optimizer(optimizer):
        return zero.whole_optimizer(student, optimizer)
    return get_optimizer_state_dict(student, optimizer, options=_options())


def write(folder: Path, networks: dict[str, dict[str, Tensor]], optimizers: dict[str, dict[str, Any]]) -> None:
    """Write what [`whole_weights`] and [`whole_optimizer`] gathered, as safetensors and JSON, under their names."""
    for name, tensors in networks.items():
        save_file({key: value.contiguous() for key, value in tensors.items()}, folder / f"{name}.safetensors")
    for name, optimizer in optimizers.items():
        moments = {
            f"{parameter}/{moment}": value.contiguous()
            for parameter, values in optimizer["state"].items()
            for moment, value in values.items()
        }
        save_file(moments, folder / f"{name}.safetensors")
        (folder / f"{name}.json").write_text(json.dumps(optimizer["param_groups"]))


def restore_weights(network: nn.Module, file: Path, is_main: bool, distributed: bool) -> None:
    """Give a network its weights back. Only the main process reads the file."""
    tensors = load_file(file) if is_main or not distributed else {}
    if hasattr(network, "peft_config"):
        set_model_state_dict(network, tensors, options=_options(broadcast_from_rank0=distributed, strict=False))
    elif any(map(zero.is_partitioned, network.parameters())):
        zero.restore_weights(network, tensors)
    else:
        set_model_state_dict(network, tensors, options=_options(broadcast_from_rank0=distributed))


def restore_optimizer(
    student: nn.Module, optimizer: Any, folder: Path, is_main: bool, distributed: bool, name: str = OPTIMIZER
) -> None:
    """Give the optimiser its state back. Only the main process reads the files."""
    state: dict[str, Any] = {}
    if is_main or not distributed:
        moments: dict[str, dict[str, Tensor]] = defaultdict(dict)
        for key, value in load_file(folder / f"{name}.safetensors").items():
            parameter, moment = key.rsplit("/", 1)
            moments[parameter][moment] = value
        state = {"state": dict(moments), "param_groups": json.loads((folder / f"{name}.json").read_text())}
    if zero.is_zero_optimizer(optimizer):
        zero.restore_optimizer(student, optimizer, state.get("state", {}))
    else:
        set_optimizer_state_dict(student, optimizer, state, options=_options(broadcast_from_rank0=distributed))
        _lay_out_like_weights(optimizer)


def _lay_out_like_weights(optimizer: torch.optim.Optimizer) -> None:
    """Give moments the memory format of their weights, which a fused optimiser takes for granted."""
    for weight, moments in optimizer.state.items():
        for name, value in moments.items():
            if value.shape == weight.shape and value.stride() != weight.stride():
                moments[name] = torch.empty_like(weight).copy_(value)
