"""What the weights of OpenAI's U-Net (guided-diffusion, consistency models) show of its architecture."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

# A block's parts, by the weight that gives each away.
MARKS = {
    "weight": "conv_in",
    "in_layers.0.weight": "resnet",
    "qkv.weight": "attention",
    "op.weight": "downsampling",
    "conv.weight": "upsampling",
}


@dataclass(frozen=True)
class Architecture:
    """What the names and shapes of a state dict in OpenAI's layout show.

    Args:
        widths (`tuple[int, ...]`): channels of each level, from the highest resolution to the lowest.
        num_blocks (`int`): residual blocks of a level on the way down; one more on the way up.
        attention (`tuple[bool, ...]`): which levels have it.
        resnet_resampling (`bool`): whether resolution changes in residual blocks rather than convolutions.
    """

    widths: tuple[int, ...]
    num_blocks: int
    attention: tuple[bool, ...]
    resnet_resampling: bool


class Part(NamedTuple):
    """A part of the U-Net: what it is, and its prefix in OpenAI's layout and in a `UNet2DModel`."""

    kind: str
    source: str
    target: str


def read_architecture(weights: Mapping[str, Tensor]) -> Architecture:
    """The architecture that the names and shapes of a state dict in OpenAI's layout show.

    Raises:
        `ValueError`: if it is another layout, naming where it differs.
    """
    kinds = _found_parts(weights)
    inputs, outputs = _indices(kinds, "input_blocks"), len(_indices(kinds, "output_blocks"))
    if inputs != list(range(len(inputs))):
        raise ValueError(
            f"The input blocks that have weights are {inputs}: resolution that changes without weights "
            "(`conv_resample=False`) is nothing that a UNet2DModel has."
        )
    # A block that changes the resolution differs from others only on the way up, by its place behind another part.
    ups = {index: part for index in range(outputs) for part in (1, 2)
           if kinds.get(f"output_blocks.{index}.{part}") in ("resnet", "upsampling")}  # fmt: skip
    levels = len(ups) + 1
    per_level = outputs // levels
    firsts = [1 + level * per_level for level in range(levels)]
    missing = [f"input_blocks.{first}.0" for first in firsts if kinds.get(f"input_blocks.{first}.0") != "resnet"]
    if missing or kinds.get("input_blocks.0.0") != "conv_in":
        raise ValueError(
            f"The weights are not those of a U-Net in OpenAI's layout: {', '.join(missing) or 'input_blocks.0.0'} "
            f"is not what its place asks for. Found: {few(weights)}."
        )
    architecture = Architecture(
        widths=tuple(len(weight_of(weights, f"input_blocks.{first}.0.in_layers.2")) for first in firsts),
        num_blocks=per_level - 1,
        attention=tuple(f"input_blocks.{first}.1" in kinds for first in firsts),
        resnet_resampling="resnet" in {kinds[f"output_blocks.{index}.{part}"] for index, part in ups.items()},
    )
    expected = {"input_blocks.0.0": "conv_in", **{part.source: part.kind for part in parts(architecture)}}
    odd = sorted(name for name in expected.keys() | kinds.keys() if expected.get(name) != kinds.get(name))
    if odd:
        raise ValueError(
            f"The weights are not those of a U-Net of {architecture}: {odd[0]} is {kinds.get(odd[0], 'missing')}, "
            f"expected {expected.get(odd[0], 'nothing')}. Levels must be alike on the way down and up."
        )
    return architecture


def _found_parts(weights: Mapping[str, Tensor]) -> dict[str, str]:
    """The kind of every part of the blocks, by its prefix."""
    pattern = re.compile(r"((?:input|output)_blocks\.\d+\.\d+|middle_block\.\d+)\.(.+)")
    matches = filter(None, map(pattern.fullmatch, weights))
    return {match[1]: MARKS[match[2]] for match in matches if match[2] in MARKS}


def _indices(kinds: Mapping[str, str], name: str) -> list[int]:
    return sorted({int(prefix.split(".")[1]) for prefix in kinds if prefix.startswith(f"{name}.")})


def parts(architecture: Architecture) -> Iterator[Part]:
    """Every part between the first convolution and the last, in OpenAI's order."""
    levels, num_blocks = len(architecture.widths), architecture.num_blocks
    down, up = ("resnet", "resnet") if architecture.resnet_resampling else ("downsampling", "upsampling")
    for level, attention in enumerate(architecture.attention):
        source, target = 1 + level * (num_blocks + 1), f"down_blocks.{level}"
        for index in range(num_blocks):
            yield from _block(f"input_blocks.{source + index}", target, index, attention)
        if level < levels - 1:
            yield Part(down, f"input_blocks.{source + num_blocks}.0", f"{target}.downsamplers.0")
    yield Part("resnet", "middle_block.0", "mid_block.resnets.0")
    yield Part("attention", "middle_block.1", "mid_block.attentions.0")
    yield Part("resnet", "middle_block.2", "mid_block.resnets.1")
    for level, attention in enumerate(reversed(architecture.attention)):
        source, target = level * (num_blocks + 1), f"up_blocks.{level}"
        for index in range(num_blocks + 1):
            yield from _block(f"output_blocks.{source + index}", target, index, attention)
        if level < levels - 1:
            yield Part(up, f"output_blocks.{source + num_blocks}.{1 + attention}", f"{target}.upsamplers.0")


def _block(source: str, target: str, index: int, attention: bool) -> Iterator[Part]:
    yield Part("resnet", f"{source}.0", f"{target}.resnets.{index}")
    if attention:
        yield Part("attention", f"{source}.1", f"{target}.attentions.{index}")


def weight_of(weights: Mapping[str, Tensor], layer: str) -> Tensor:
    """The weight of a layer that every U-Net has."""
    if f"{layer}.weight" not in weights:
        raise ValueError(
            f"The weights are not those of a U-Net in OpenAI's layout: `{layer}.weight` is missing. "
            f"Found: {few(weights)}."
        )
    return weights[f"{layer}.weight"]


def few(weights: Mapping[str, Tensor], number: int = 5) -> str:
    """The first names of some weights, for messages."""
    names = sorted(weights)
    return ", ".join(names[:number]) + (f" and {len(names) - number} more" if len(names) > number else "")
