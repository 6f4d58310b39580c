"""OpenAI's U-Net (guided-diffusion, consistency models) as a diffusers `UNet2DModel`.

The two are the same network under other names. The widths, the blocks of each level, where attention is, how blocks
are resampled and conditioned, and the classes are read from a state dict; what that does not show is in [`Traits`].
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import UNet2DModel
from torch import Tensor

from cm_diffusers.importing.architecture import Architecture, few, parts, read_architecture, weight_of

# How the rows of an attention layer's joint projection are ordered, from outermost to innermost.
QKV_ORDERS = {
    "new": ("qkv", "head", "channel"),  # `use_new_attention_order`, and flash attention
    "legacy": ("head", "qkv", "channel"),
    "interleaved": ("head", "channel", "qkv"),  # NVlabs
}

OUTER_LAYERS = {
    "input_blocks.0.0": "conv_in",
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb": "class_embedding",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
RESNET_LAYERS = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}


@dataclass(frozen=True)
class Traits:
    """What the shapes of a U-Net's weights do not show.

    Args:
        image_size (`int`): height and width in pixels.
        attention_head_dim (`int`): channels of an attention head.
        qkv_order (`str`): a key of `QKV_ORDERS`.
        norm_num_groups (`int`): groups of every group normalisation.
        norm_eps (`float`): its epsilon.
    """

    image_size: int
    attention_head_dim: int
    qkv_order: str
    norm_num_groups: int = 32
    norm_eps: float = 1e-5


# Of the published models of the consistency_models repository: ImageNet-64, LSUN Bedroom-256 and Cat-256.
PUBLISHED_TRAITS = {
    Architecture((192, 384, 576, 768), 3, (False, True, True, True), True): Traits(64, 64, "new"),
    Architecture((256, 256, 512, 512, 1024, 1024), 2, (False,) * 3 + (True,) * 3, True): Traits(256, 64, "new"),
}


def convert_unet(weights: Mapping[str, Tensor], traits: Traits) -> UNet2DModel:
    """A `UNet2DModel` that computes what the U-Net of these weights computes.

    Args:
        weights (`Mapping[str, Tensor]`): a state dict in OpenAI's layout, of any dtype.
        traits ([`Traits`]): what it does not show.

    Returns:
        `UNet2DModel`: in float32 and eval mode; without dropout, of which weights say nothing.

    Raises:
        `ValueError`: if the layout is another one, or has parts that `UNet2DModel` lacks, which are named.
    """
    architecture = read_architecture(weights)
    config = _config(weights, architecture, traits)
    with torch.device("meta"):  # no memory and no time for random weights
        unet = UNet2DModel(**config)
    try:
        unet.load_state_dict(_renamed(weights, architecture, traits), assign=True)
    except RuntimeError as error:
        raise ValueError(f"The weights do not fit a UNet2DModel of {architecture}: {error}") from error
    return unet.eval()


def _renamed(weights: Mapping[str, Tensor], architecture: Architecture, traits: Traits) -> dict[str, Tensor]:
    """The state dict of the `UNet2DModel`."""
    left = dict(weights)
    state: dict[str, Tensor] = {}
    _move(left, state, "", "", OUTER_LAYERS)
    for kind, source, target in parts(architecture):
        if kind == "attention":
            _move_attention(left, state, source, target, traits)
        else:
            _move(left, state, f"{source}.", f"{target}.", _layers(kind))
    if left:
        raise ValueError(f"These weights have no place in a UNet2DModel: {few(left)}.")
    return state


def _layers(kind: str) -> dict[str, str]:
    return {"resnet": RESNET_LAYERS, "downsampling": {"op": "conv"}, "upsampling": {"conv": "conv"}}[kind]


def _config(weights: Mapping[str, Tensor], architecture: Architecture, traits: Traits) -> dict[str, Any]:
    """The arguments of `UNet2DModel`."""
    conv_in, time_layer, conv_out = (
        weight_of(weights, layer) for layer in ("input_blocks.0.0", "time_embed.0", "out.2")
    )
    _check(architecture, traits, conv_in, time_layer, conv_out)
    resnet = "Resnet{}sampleBlock2D" if architecture.resnet_resampling else "{}Block2D"
    kinds = ["Attn{}Block2D" if attention else resnet for attention in architecture.attention]
    labels, conditioning = weights.get("label_emb.weight"), len(weight_of(weights, "middle_block.0.emb_layers.1"))
    return {
        "sample_size": traits.image_size,
        "in_channels": conv_in.shape[1],
        "out_channels": len(conv_out),
        "time_embedding_dim": len(time_layer),
        "down_block_types": tuple(kind.format("Down") for kind in kinds),
        "up_block_types": tuple(kind.format("Up") for kind in reversed(kinds)),
        "block_out_channels": architecture.widths,
        "layers_per_block": architecture.num_blocks,
        "downsample_type": "resnet" if architecture.resnet_resampling else "conv",
        "upsample_type": "resnet" if architecture.resnet_resampling else "conv",
        "attention_head_dim": traits.attention_head_dim,
        "norm_num_groups": traits.norm_num_groups,
        "attn_norm_num_groups": traits.norm_num_groups,
        "norm_eps": traits.norm_eps,
        "resnet_time_scale_shift": "scale_shift" if conditioning == 2 * architecture.widths[-1] else "default",
        "num_class_embeds": None if labels is None else len(labels),
    }


def _check(architecture: Architecture, traits: Traits, conv_in: Tensor, time_layer: Tensor, conv_out: Tensor) -> None:
    """Refuse what a `UNet2DModel` would compute otherwise."""
    widths, head_dim = architecture.widths, traits.attention_head_dim
    if (conv_in.ndim, time_layer.ndim, conv_out.ndim) != (4, 2, 4):
        raise ValueError("The first and the last layer must be convolutions of images, the time embedding's linear.")
    if traits.qkv_order not in QKV_ORDERS:
        raise ValueError(f"`qkv_order` must be one of {', '.join(QKV_ORDERS)}, got {traits.qkv_order!r}.")
    factor = 2 ** (len(widths) - 1)
    if traits.image_size < factor or traits.image_size % factor:
        raise ValueError(
            f"`image_size` must be a multiple of {factor} for {len(widths)} levels, got {traits.image_size}."
        )
    attended = {widths[-1], *(width for width, has in zip(widths, architecture.attention, strict=True) if has)}
    uneven = sorted(width for width in attended if head_dim < 1 or width % head_dim)
    if uneven:
        raise ValueError(f"`attention_head_dim={head_dim}` does not divide {uneven[0]} channels of attention.")
    if not len(conv_in) == widths[0] == time_layer.shape[1]:
        raise ValueError(
            "In a UNet2DModel the first convolution, the first level and the time embedding are equally wide; found "
            f"{len(conv_in)}, {widths[0]} and {time_layer.shape[1]} channels."
        )
    if len(conv_out) != conv_in.shape[1]:
        raise ValueError(
            f"The network maps {conv_in.shape[1]} channels to {len(conv_out)}; EDM and consistency networks have as "
            "many out as in."
        )


def _move(left: dict[str, Tensor], state: dict[str, Tensor], source: str, target: str, layers: dict[str, str]) -> None:
    for old, new in layers.items():
        for name in ("weight", "bias"):
            if f"{source}{old}.{name}" in left:
                state[f"{target}{new}.{name}"] = _own(left.pop(f"{source}{old}.{name}"))


def _move_attention(
    left: dict[str, Tensor], state: dict[str, Tensor], source: str, target: str, traits: Traits
) -> None:
    _move(left, state, f"{source}.", f"{target}.", {"norm": "group_norm", "proj_out": "to_out.0"})
    weight = f"{target}.to_out.0.weight"
    if weight in state:
        state[weight] = state[weight].flatten(1)  # a convolution of width 1
    for name in ("weight", "bias"):
        joint = left.pop(f"{source}.qkv.{name}", None)
        if joint is not None:
            for layer, part in zip("qkv", split_qkv(joint, traits), strict=True):
                state[f"{target}.to_{layer}.{name}"] = _own(part)


def split_qkv(joint: Tensor, traits: Traits) -> Tensor:
    """Queries, keys and values out of their joint projection.

    Args:
        joint (`Tensor` of shape `(3 * channels, ...)`): weight or bias.
        traits ([`Traits`]): gives the order and the size of a head.

    Returns:
        `Tensor` of shape `(3, channels)` or `(3, channels, channels_in)`, heads outermost.
    """
    order = QKV_ORDERS[traits.qkv_order]
    head_dim = traits.attention_head_dim
    sizes = {"qkv": 3, "head": len(joint) // (3 * head_dim), "channel": head_dim}
    split = joint.unflatten(0, [sizes[axis] for axis in order]).movedim(order.index("qkv"), 0).flatten(1, 2)
    return split.flatten(2) if split.ndim > 2 else split


def _own(tensor: Tensor) -> Tensor:
    """A float32 copy: views of one storage cannot be saved apart."""
    return tensor.detach().to(torch.float32, copy=True, memory_format=torch.contiguous_format)
