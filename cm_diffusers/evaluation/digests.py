"""What tells one network from another."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn


def network_digest(network: nn.Module, *facts: str) -> str:
    """Sixteen hexadecimal digits of the weights, and of whatever else decides what the network gives."""
    digest = hashlib.sha256("\0".join(facts).encode())
    for name, value in sorted(network.state_dict().items()):
        digest.update(name.encode() + value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def model_digest(network: nn.Module, scheduler_config: Mapping[str, Any]) -> str:
    """Of the weights and the scheduler: the same weights at other noise levels draw other images."""
    config = {name: value for name, value in scheduler_config.items() if not name.startswith("_")}
    return network_digest(network, json.dumps(config, sort_keys=True, default=str))
