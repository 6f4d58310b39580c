"""Students that are their teacher and a few weights more: low-rank adapters (Hu et al. 2021), by peft."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

# What LCM-LoRA adapts: attention, feed-forward, convolutions and the way time takes into blocks (Luo et al. 2023).
TARGETS = (
    "to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1", "conv2",
    "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj",
)  # fmt: skip


def with_adapters(
    network: nn.Module, rank: int, alpha: int | None = None, targets: Sequence[str] | None = None, dora: bool = False
) -> nn.Module:
    """The network with adapters, which are all that is trained. Its other weights are the network's own, not copies.

    Args:
        network (`nn.Module`): a diffusers network that knows adapters; left as it is, but frozen.
        rank (`int`): of the adapters.
        alpha (`int`, *optional*): they count `alpha / rank`; by default 1.
        targets (`Sequence[str]`, *optional*): names, or ends of names, of the layers that are adapted.
        dora (`bool`): also train the size of each output (Liu et al. 2024).

    Raises:
        `ValueError`: if none of the targets is there, or the network is of a class that knows no adapters.
    """
    from peft import LoraConfig

    if not hasattr(network, "add_adapter"):
        raise ValueError(f"`lora_rank` needs a text-to-image network; {type(network).__name__} knows no adapters.")
    adapted: Any = sharing_frozen(network.requires_grad_(False))
    config = LoraConfig(
        r=rank, lora_alpha=rank if alpha is None else alpha, target_modules=list(targets or TARGETS), use_dora=dora,
        init_lora_weights="gaussian",
    )  # fmt: skip
    adapted.add_adapter(config)
    for weight in trained(adapted):
        weight.data = weight.data.float()
    return adapted  # type: ignore[no-any-return]


def sharing_frozen(network: nn.Module) -> nn.Module:
    """A copy of a network that has the frozen weights in common with it."""
    frozen = {id(weight): weight for weight in network.parameters() if not weight.requires_grad}
    return copy.deepcopy(network, frozen)


def trained(network: nn.Module) -> list[nn.Parameter]:
    """The weights that are trained."""
    return [weight for weight in network.parameters() if weight.requires_grad]


def is_adapter(name: str) -> bool:
    """Whether a weight's name is that of an adapter's."""
    return ".lora_" in name


def save_adapters(pipeline: Any, folder: Path) -> None:
    """Write the adapters of a pipeline's network as `load_lora_weights` reads them."""
    from peft.utils import get_peft_model_state_dict

    # Not renamed for diffusers: its converter knows the layers of attention alone, and would mix two conventions.
    layers = get_peft_model_state_dict(pipeline.unet)
    config = pipeline.unet.peft_config["default"].to_dict()
    type(pipeline).save_lora_weights(folder, unet_lora_layers=layers, unet_lora_adapter_metadata=config)
