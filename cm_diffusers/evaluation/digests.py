"""What tells one network from another."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn


def network_digest(network: nn.Module, *facts: str) -> str:
    """Sixteen hexadecimal digits of the weights, and of whatever else decides what the network gives.

    Weights stored in half precision have the digits of the same numbers in float32.
    """
    return weights_digest(network.state_dict(), *facts)


def weights_digest(weights: Mapping[str, Tensor], *facts: str) -> str:
    """The same of weights by their names."""
    digest = hashlib.sha256("\0".join(facts).encode())
    for name, value in sorted(weights.items()):
        exact = value.float() if value.dtype in (torch.float16, torch.bfloat16) else value
        digest.update(name.encode() + exact.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def model_digest(network: nn.Module, scheduler_config: Mapping[str, Any]) -> str:
    """Of the weights and the scheduler: the same weights at other noise levels draw other images.

    Of a network with adapters, these alone are weighed, as they are saved.
    """
    adapters = getattr(network, "peft_config", {})
    weights = _adapters(network, adapters) if adapters else network.state_dict()
    return student_digest(weights, scheduler_config)


def student_digest(weights: Mapping[str, Tensor], scheduler_config: Mapping[str, Any]) -> str:
    """The same of weights as they are saved."""
    config = {name: value for name, value in scheduler_config.items() if not name.startswith("_")}
    return weights_digest(weights, json.dumps(config, sort_keys=True, default=str))


def _adapters(network: nn.Module, names: Iterable[str]) -> dict[str, Tensor]:
    """Their weights, without the names that they go by in this process."""
    from peft.utils import get_peft_model_state_dict

    found: dict[str, Tensor] = {}
    for name in names:
        found |= get_peft_model_state_dict(network, adapter_name=name)
    return found
