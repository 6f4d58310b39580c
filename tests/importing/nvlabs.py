"""NVlabs' EDM networks, written down a second time, and pickles with the structure of `torch_utils.persistence`.

A persistent object reduces to a call of a global of that module with a dict that holds the object's state beside the
source of its module. The module is made up while a pickle is written, and is gone when it is read.
"""

from __future__ import annotations

import contextlib
import math
import pickle
import sys
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from openai_unet import randomise, sinusoids
from torch import Tensor, nn
from torch.nn import functional as F

SOURCE = "raise AssertionError('the source in a pickle was executed')\n"


def _reconstruct_persistent_obj(meta: dict) -> Any:
    raise AssertionError("a pickle was loaded with its own functions")


class EasyDict(dict):
    """A dict of dnnlib."""


@contextlib.contextmanager
def nvlabs_modules() -> Iterator[None]:
    """`torch_utils.persistence` and `dnnlib.util`, for as long as a pickle is written."""
    names = {"torch_utils.persistence": _reconstruct_persistent_obj, "dnnlib.util": EasyDict}
    home = __name__
    for name, member in names.items():
        for path in (name.split(".")[0], name):
            sys.modules[path] = types.ModuleType(path)
        setattr(sys.modules[name], member.__name__, member)
        member.__module__ = name
    try:
        yield
    finally:
        for name, member in names.items():
            member.__module__ = home
            del sys.modules[name], sys.modules[name.split(".")[0]]


class Persistent:
    """Reduces as a class under NVlabs' decorator does."""

    def __reduce__(self) -> tuple:
        state = {**self.__dict__, "_init_args": (), "_init_kwargs": {"init_weight": np.sqrt(1 / 3)}}
        meta = {
            "type": "class", "version": 6, "module_src": SOURCE, "class_name": type(self).__name__, "state": state,
        }  # fmt: skip
        return _reconstruct_persistent_obj, (meta,), None


class Loss(Persistent):
    def __init__(self) -> None:
        self.P_mean, self.weights = -1.2, np.arange(3.0)


def write_pickle(path: Path, network: nn.Module, protocol: int = pickle.DEFAULT_PROTOCOL) -> Path:
    """What NVlabs' training loop writes: the network, its loss, and how the data were loaded."""
    with nvlabs_modules(), path.open("wb") as file:
        data = {"ema": network, "loss_fn": Loss(), "augment_pipe": None, "dataset_kwargs": EasyDict(use_labels=False)}
        pickle.dump(data, file, protocol)
    return path


class Linear(Persistent, nn.Module):
    def __init__(self, c_in: int, c_out: int, bias: bool = True) -> None:
        super().__init__()
        self.in_features, self.out_features = c_in, c_out
        self.weight = nn.Parameter(torch.zeros(c_out, c_in))
        self.bias = nn.Parameter(torch.zeros(c_out)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class GroupNorm(Persistent, nn.Module):
    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.num_groups, self.eps = min(32, channels // 4), eps
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        return F.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)


class Conv2d(Persistent, nn.Module):
    """`kernel=0` only resamples; resampling comes before the convolution."""

    def __init__(
        self, c_in: int, c_out: int, kernel: int, up: bool = False, down: bool = False, taps: Sequence[int] = (1, 1)
    ) -> None:
        super().__init__()
        self.in_channels, self.out_channels, self.up, self.down, self.fused_resample = c_in, c_out, up, down, False
        self.weight = nn.Parameter(torch.zeros(c_out, c_in, kernel, kernel)) if kernel else None
        self.bias = nn.Parameter(torch.zeros(c_out)) if kernel else None
        line = torch.tensor(taps, dtype=torch.float32)
        self.register_buffer("resample_filter", torch.outer(line, line)[None, None] / line.sum() ** 2)
        if not (up or down):
            self.resample_filter = None

    def forward(self, x: Tensor) -> Tensor:
        if self.up or self.down:
            kernel = self.resample_filter.repeat(x.shape[1], 1, 1, 1)
            padding, groups = (kernel.shape[-1] - 1) // 2, x.shape[1]
            if self.up:
                x = F.conv_transpose2d(x, 4 * kernel, stride=2, padding=padding, groups=groups)
            else:
                x = F.conv2d(x, kernel, stride=2, padding=padding, groups=groups)
        return x if self.weight is None else F.conv2d(x, self.weight, self.bias, padding=self.weight.shape[-1] // 2)


class UNetBlock(Persistent, nn.Module):
    def __init__(
        self, c_in: int, c_out: int, c_emb: int, attention: bool = False, up: bool = False, down: bool = False,
        skip_scale: float = 1, resample_proj: bool = False, taps: Sequence[int] = (1, 1), head_dim: int = 64,
        eps: float = 1e-5, adaptive_scale: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        self.in_channels, self.out_channels, self.emb_channels, self.dropout = c_in, c_out, c_emb, 0.1
        self.num_heads = c_out // head_dim if attention else 0
        self.skip_scale, self.adaptive_scale = skip_scale, adaptive_scale
        self.norm0, self.conv0 = GroupNorm(c_in, eps), Conv2d(c_in, c_out, 3, up, down, taps)
        self.affine = Linear(c_emb, 2 * c_out)
        self.norm1, self.conv1 = GroupNorm(c_out, eps), Conv2d(c_out, c_out, 3)
        self.skip = None
        if c_in != c_out or up or down:
            self.skip = Conv2d(c_in, c_out, int(c_in != c_out or resample_proj), up, down, taps)
        if attention:
            self.norm2, self.qkv, self.proj = GroupNorm(c_out), Conv2d(c_out, 3 * c_out, 1), Conv2d(c_out, c_out, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        scale, shift = self.affine(emb)[:, :, None, None].chunk(2, dim=1)
        h = self.conv0(F.silu(self.norm0(x)))
        h = self.conv1(F.silu(self.norm1(h) * (1 + scale) + shift))
        x = (h + (x if self.skip is None else self.skip(x))) * self.skip_scale
        return x if not self.num_heads else (x + self._attend(x)) * self.skip_scale

    def _attend(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        size = channels // self.num_heads
        qkv = self.qkv(self.norm2(x)).reshape(batch * self.num_heads, size, 3, height * width)
        q, k, v = qkv.unbind(2)
        weight = torch.softmax(q.transpose(1, 2) @ k / math.sqrt(size), dim=2)
        return self.proj((v @ weight.transpose(1, 2)).reshape(x.shape))


class PositionalEmbedding(Persistent, nn.Module):
    def __init__(self, num_channels: int) -> None:
        super().__init__()
        self.num_channels, self.max_positions, self.endpoint = num_channels, 10000, False

    def forward(self, time: Tensor) -> Tensor:
        return sinusoids(time, self.num_channels)


class DhariwalUNet(Persistent, nn.Module):
    def __init__(
        self, size: int, channels: int = 3, label_dim: int = 0, augment_dim: int = 0, width: int = 128,
        mult: Sequence[int] = (1, 2), num_blocks: int = 1, attention: Sequence[int] = (4,), **block: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        c_emb = 4 * width
        self.label_dropout = 0
        self.map_noise = PositionalEmbedding(width)
        self.map_augment = Linear(augment_dim, width, bias=False) if augment_dim else None
        self.map_layer0, self.map_layer1 = Linear(width, c_emb), Linear(c_emb, c_emb)
        self.map_label = Linear(label_dim, c_emb, bias=False) if label_dim else None
        self.enc, self.dec = nn.ModuleDict(), nn.ModuleDict()
        c, skips = width * mult[0], []
        for level, factor in enumerate(mult):
            res = size >> level
            name = f"{res}x{res}"
            if level:
                self.enc[f"{name}_down"] = UNetBlock(c, c, c_emb, down=True, **block)
            else:
                self.enc[f"{name}_conv"] = Conv2d(channels, c, 3)
            skips.append(c)
            for index in range(num_blocks):
                self.enc[f"{name}_block{index}"] = UNetBlock(c, width * factor, c_emb, res in attention, **block)
                c = width * factor
                skips.append(c)
        for level, factor in reversed(list(enumerate(mult))):
            res = size >> level
            name = f"{res}x{res}"
            if level == len(mult) - 1:
                self.dec[f"{name}_in0"] = UNetBlock(c, c, c_emb, True, **block)
                self.dec[f"{name}_in1"] = UNetBlock(c, c, c_emb, **block)
            else:
                self.dec[f"{name}_up"] = UNetBlock(c, c, c_emb, up=True, **block)
            for index in range(num_blocks + 1):
                c_in = c + skips.pop()
                c = width * factor
                self.dec[f"{name}_block{index}"] = UNetBlock(c_in, c, c_emb, res in attention, **block)
        self.out_norm, self.out_conv = GroupNorm(c), Conv2d(c, channels, 3)

    def forward(self, x: Tensor, time: Tensor, labels: Tensor | None = None) -> Tensor:
        emb = self.map_layer1(F.silu(self.map_layer0(self.map_noise(time))))
        if self.map_label is not None:
            emb = emb + self.map_label(labels)
        emb, skips = F.silu(emb), []
        for block in self.enc.values():
            x = block(x, emb) if isinstance(block, UNetBlock) else block(x)
            skips.append(x)
        for block in self.dec.values():
            if x.shape[1] != block.in_channels:
                x = torch.cat([x, skips.pop()], dim=1)
            x = block(x, emb)
        return self.out_conv(F.silu(self.out_norm(x)))


class EDMPrecond(Persistent, nn.Module):
    """D, with one-hot labels."""

    def __init__(self, model: nn.Module, size: int, channels: int = 3, label_dim: int = 0) -> None:
        super().__init__()
        self.img_resolution, self.img_channels, self.label_dim, self.use_fp16 = size, channels, label_dim, True
        self.sigma_min, self.sigma_max, self.sigma_data = 0, math.inf, 0.5
        self.model = model

    @torch.no_grad()
    def forward(self, x: Tensor, sigma: Tensor, labels: Tensor | None = None) -> Tensor:
        s, d = sigma[:, None, None, None], self.sigma_data
        output = self.model(x / (s**2 + d**2).sqrt(), sigma.log() / 4, labels)
        return d**2 / (s**2 + d**2) * x + s * d / (s**2 + d**2).sqrt() * output


class VPPrecond(EDMPrecond):
    """By name only."""


class SongUNet(DhariwalUNet):
    """By name only."""


def build(size: int = 8, precond: type[EDMPrecond] = EDMPrecond, model: type[DhariwalUNet] = DhariwalUNet,
          channels: int = 3, label_dim: int = 0, **config: Any) -> EDMPrecond:  # fmt: skip
    """A network as NVlabs nests them, with random weights."""
    unet = model(size, channels, label_dim, **config)
    network = randomise(precond(unet, size, channels, label_dim))
    assert isinstance(network, EDMPrecond)
    return network
