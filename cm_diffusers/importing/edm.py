"""NVlabs' pickled EDM networks (edm-*.pkl) as a diffusers `UNet2DModel` and its scheduler.

`DhariwalUNet` is OpenAI's U-Net under other names: the weights are renamed, and go the way of OpenAI's own.

`SongUNet` (DDPM++ and NCSN++, the models of CIFAR-10, FFHQ and AFHQv2) is refused, because no `UNet2DModel` computes
the same. Its blocks that change the resolution have a learned 1 x 1 convolution on their skip path, where diffusers'
have none; every skip is scaled by sqrt(1/2), which group normalisation undoes only up to its epsilon; labels enter
before the time embedding's layers, not behind them; and the first convolution may be narrower than the first level.

Of the preconditionings, only `EDMPrecond` has a scheduler in diffusers that computes the same; `REASONS` says why the
others have none.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from diffusers import EDMEulerScheduler, UNet2DModel
from torch import Tensor

from cm_diffusers.importing.openai import Traits, convert_unet
from cm_diffusers.importing.unpickling import PickledModule

OUTER_LAYERS = {"map_layer0": "time_embed.0", "map_layer1": "time_embed.2", "out_norm": "out.0", "out_conv": "out.2"}
BLOCK_LAYERS = {
    "norm0": "0.in_layers.0",
    "conv0": "0.in_layers.2",
    "affine": "0.emb_layers.1",
    "norm1": "0.out_layers.0",
    "conv1": "0.out_layers.3",
    "skip": "0.skip_connection",
    "norm2": "1.norm",
    "qkv": "1.qkv",
    "proj": "1.proj_out",
}
REASONS = {
    "SongUNet": "a UNet2DModel has no 1 x 1 convolution on the skip path of blocks that change the resolution, and no "
    "scaled skips",
    "VPPrecond": "no diffusers scheduler has its continuous time",
    "VEPrecond": "no diffusers scheduler has its time, ln(sigma / 2), and its scalings",
    "iDDPMPrecond": "it rounds sigma to a table of noise levels",
}
# The range that EDM samples in (Karras et al. 2022, table 1); networks allow any sigma.
SIGMA_RANGE = (0.002, 80.0)


def convert_network(network: PickledModule) -> tuple[UNet2DModel, EDMEulerScheduler]:
    """The U-Net of an `EDMPrecond`, and the scheduler that describes its preconditioning.

    Augmentation labels, zero outside training, are dropped; class labels, one-hot there, become indices.

    Args:
        network ([`~cm_diffusers.importing.unpickling.PickledModule`]): an `EDMPrecond` of a `DhariwalUNet`.

    Raises:
        `ValueError`: if it is something else, or holds what a `UNet2DModel` cannot compute, which is named.
    """
    _expect(network, "EDMPrecond")
    model = network.child("model")
    _expect(model, "DhariwalUNet")
    unet = convert_unet(_openai_weights(model), _read_traits(network, model))
    low, high = (network.attribute(name) for name in ("sigma_min", "sigma_max"))
    scheduler = EDMEulerScheduler(
        sigma_min=max(float(low), SIGMA_RANGE[0]),
        sigma_max=min(float(high), SIGMA_RANGE[1]),
        sigma_data=float(network.attribute("sigma_data")),
    )
    return unet, scheduler


def _expect(module: PickledModule, class_name: str) -> None:
    if module.class_name != class_name:
        reason = REASONS.get(module.class_name)
        why = f": {reason}" if reason else ""
        raise ValueError(f"{module.class_name} cannot be imported, only {class_name}{why}.")


def _openai_weights(model: PickledModule) -> dict[str, Tensor]:
    """The state dict that the same U-Net has in OpenAI's layout."""
    weights = {}
    for layer, name in OUTER_LAYERS.items():
        weights.update(_prefixed(model.child(layer).tensors, name))
    if "map_label" in model.children:
        weights["label_emb.weight"] = model.children["map_label"].tensors["weight"].T
    for index, block in enumerate(model.child("enc").children.values()):
        named = _prefixed(block.tensors, "0") if block.class_name == "Conv2d" else _block_weights(block)
        weights.update(_prefixed(named, f"input_blocks.{index}"))
    first, second, *others = model.child("dec").children.values()
    weights.update(_prefixed(_block_weights(first), "middle_block"))
    weights.update(_prefixed(_block_weights(second, 2), "middle_block"))
    index, previous = -1, second
    for block in others:
        # OpenAI's counts the block that doubles the resolution as the last part of the one before.
        up = _changes_resolution(block)
        index += not up
        part = 1 + ("qkv" in previous.children) if up else 0
        weights.update(_prefixed(_block_weights(block, part), f"output_blocks.{index}"))
        previous = block
    return weights


def _block_weights(block: PickledModule, part: int = 0) -> dict[str, Tensor]:
    """The weights of a block under OpenAI's names, with its residual block as the given part."""
    weights = {}
    for layer, name in BLOCK_LAYERS.items():
        if layer in block.children:
            tensors = {key: value for key, value in block.children[layer].tensors.items() if key != "resample_filter"}
            place = name if layer in ("norm2", "qkv", "proj") else f"{part}{name[1:]}"
            weights.update(_prefixed(tensors, place))
    return weights


def _prefixed(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {f"{prefix}.{name}": tensor for name, tensor in tensors.items()}


def _changes_resolution(block: PickledModule) -> bool:
    conv = block.child("conv0")
    return bool(conv.attribute("up") or conv.attribute("down"))


# What the weights do not show ----------------------------------------------------------------------------------------


def _read_traits(network: PickledModule, model: PickledModule) -> Traits:
    """Image size, heads and normalisation, after a check that nothing departs from OpenAI's U-Net."""
    embedding = model.child("map_noise")
    found = (embedding.class_name, embedding.attributes.get("endpoint"), embedding.attributes.get("max_positions"))
    if found != ("PositionalEmbedding", False, 10000):
        raise ValueError(f"The time embedding {found} is not OpenAI's, ('PositionalEmbedding', False, 10000).")
    blocks = [block for block in _descendants(model) if block.class_name == "UNetBlock"]
    for block in blocks:
        _check_block(block)
    norms = [module for module in _descendants(model) if module.class_name == "GroupNorm"]
    groups, eps = _only({(norm.attribute("num_groups"), norm.attribute("eps")) for norm in norms}, "normalisations")
    attended = [block for block in blocks if "qkv" in block.children]
    heads = {block.attribute("out_channels") // block.attribute("num_heads") for block in attended}
    size, head_dim = network.attribute("img_resolution"), _only(heads, "attention heads")
    return Traits(size, head_dim, "interleaved", groups, eps)


def _check_block(block: PickledModule) -> None:
    attributes = block.attributes
    for name, needed in (("skip_scale", 1), ("adaptive_scale", True)):
        if attributes.get(name) != needed:
            raise ValueError(f"A block has `{name}={attributes.get(name)}`; a UNet2DModel is `{name}={needed}`.")
    for conv in block.children.values():
        kernel = conv.tensors.get("resample_filter")
        if kernel is not None and not torch.equal(kernel, torch.full((1, 1, 2, 2), 0.25)):
            raise ValueError(f"A block resamples with the filter {kernel.tolist()}, not with [1, 1].")
        if conv.attributes.get("fused_resample"):
            raise ValueError("A block has `fused_resample=True`, which a UNet2DModel has not.")
    if _changes_resolution(block) and "weight" in block.child("skip").tensors:
        raise ValueError(f"A block has `resample_proj=True`: {REASONS['SongUNet']}.")


def _descendants(module: PickledModule) -> Iterator[PickledModule]:
    for child in module.children.values():
        yield child
        yield from _descendants(child)


def _only(values: set[Any], what: str) -> Any:
    if len(values) != 1:
        found = ", ".join(map(str, sorted(values)))
        raise ValueError(f"The {what} of a UNet2DModel are all alike, those of this network differ: {found}.")
    return next(iter(values))
