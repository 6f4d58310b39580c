"""OpenAI's U-Net, written down a second time: the names of its parameters, and what it computes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def randomise(network: nn.Module, seed: int = 0) -> nn.Module:
    """Random weights everywhere, also where the source starts from zero, that keep activations near one."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim == 1:
            is_scale = bool((parameter.data == 1).all())
            parameter.data = is_scale + 0.2 * noise
        else:
            parameter.data = noise / math.sqrt(parameter[0].numel())
    return network.eval()


def sinusoids(time: Tensor, size: int) -> Tensor:
    half = size // 2
    angles = time[:, None] * torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32) / half)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class ResBlock(nn.Module):
    def __init__(self, c_in: int, c_out: int, c_emb: int, film: bool, resample: str | None = None) -> None:
        super().__init__()
        self.film, self.resample = film, resample
        self.in_layers = nn.Sequential(nn.GroupNorm(32, c_in), nn.SiLU(), nn.Conv2d(c_in, c_out, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(c_emb, c_out * (1 + film)))
        self.out_layers = nn.Sequential(
            nn.GroupNorm(32, c_out), nn.SiLU(), nn.Dropout(0.1), nn.Conv2d(c_out, c_out, 3, padding=1)
        )
        self.skip_connection = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def resampled(self, x: Tensor) -> Tensor:
        if self.resample == "down":
            return F.avg_pool2d(x, 2)
        return F.interpolate(x, scale_factor=2) if self.resample == "up" else x

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        norm, act, conv = self.in_layers
        h = conv(self.resampled(act(norm(x))))
        condition = self.emb_layers(emb)[:, :, None, None]
        if self.film:
            scale, shift = condition.chunk(2, dim=1)
            h = self.out_layers[1:](self.out_layers[0](h) * (1 + scale) + shift)
        else:
            h = self.out_layers(h + condition)
        return self.skip_connection(self.resampled(x)) + h


class AttentionBlock(nn.Module):
    def __init__(self, channels: int, head_dim: int, order: str, projection_dims: int = 2) -> None:
        super().__init__()
        self.heads, self.order = channels // head_dim, order
        self.norm = nn.GroupNorm(32, channels)
        conv = nn.Conv2d if projection_dims == 2 else nn.Conv1d
        self.dims = projection_dims
        self.qkv, self.proj_out = conv(channels, 3 * channels, 1), conv(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        h = self.norm(x)
        qkv = self.qkv(h if self.dims == 2 else h.flatten(2)).reshape(batch, 3 * channels, -1)
        if self.order == "new":
            q, k, v = qkv.reshape(batch, 3, self.heads, channels // self.heads, -1).unbind(1)
        else:
            q, k, v = qkv.reshape(batch, self.heads, 3, channels // self.heads, -1).unbind(2)
        weight = torch.softmax(torch.einsum("bhct,bhcs->bhts", q, k) / math.sqrt(channels // self.heads), dim=-1)
        a = torch.einsum("bhts,bhcs->bhct", weight, v)
        a = a.reshape(batch, channels, height, width) if self.dims == 2 else a.reshape(batch, channels, -1)
        return x + self.proj_out(a).reshape(x.shape)


class Downsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class Upsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2))


class Block(nn.Sequential):
    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        for layer in self:
            x = layer(x, emb) if isinstance(layer, ResBlock) else layer(x)
        return x


class OpenAIUNet(nn.Module):
    """`widths` are channels per level; `attention` says which levels attend."""

    def __init__(
        self,
        widths: Sequence[int] = (32, 64),
        num_blocks: int = 1,
        attention: Sequence[bool] = (False, True),
        head_dim: int = 16,
        order: str = "new",
        film: bool = True,
        resblock_updown: bool = True,
        num_classes: int | None = None,
        projection_dims: int = 2,
        channels: int = 3,
    ) -> None:
        super().__init__()
        self.width = width = widths[0]
        c_emb, last = 4 * width, len(widths) - 1
        self.time_embed = nn.Sequential(nn.Linear(width, c_emb), nn.SiLU(), nn.Linear(c_emb, c_emb))
        if num_classes is not None:
            self.label_emb = nn.Embedding(num_classes, c_emb)

        def attend(c: int) -> AttentionBlock:
            return AttentionBlock(c, head_dim, order, projection_dims)

        blocks, skips = [Block(nn.Conv2d(channels, width, 3, padding=1))], [width]
        for level, c in enumerate(widths):
            for _ in range(num_blocks):
                blocks.append(Block(ResBlock(skips[-1], c, c_emb, film), *[attend(c)] * attention[level]))
                skips.append(c)
            if level < last:
                blocks.append(Block(ResBlock(c, c, c_emb, film, "down") if resblock_updown else Downsample(c)))
                skips.append(c)
        self.input_blocks = nn.ModuleList(blocks)
        c = widths[-1]
        self.middle_block = Block(ResBlock(c, c, c_emb, film), attend(c), ResBlock(c, c, c_emb, film))
        blocks = []
        for level, c_out in reversed(list(enumerate(widths))):
            for index in range(num_blocks + 1):
                layers: list[nn.Module] = [ResBlock(c + skips.pop(), c_out, c_emb, film)]
                c = c_out
                layers += [attend(c)] * attention[level]
                if level and index == num_blocks:
                    layers.append(ResBlock(c, c, c_emb, film, "up") if resblock_updown else Upsample(c))
                blocks.append(Block(*layers))
        self.output_blocks = nn.ModuleList(blocks)
        self.out = nn.Sequential(nn.GroupNorm(32, width), nn.SiLU(), nn.Conv2d(width, channels, 3, padding=1))

    @torch.no_grad()
    def forward(self, x: Tensor, time: Tensor, labels: Tensor | None = None) -> Tensor:
        emb = self.time_embed(sinusoids(time, self.width))
        if labels is not None:
            emb = emb + self.label_emb(labels)
        skips = []
        for block in self.input_blocks:
            x = block(x, emb)
            skips.append(x)
        x = self.middle_block(x, emb)
        for block in self.output_blocks:
            x = block(torch.cat([x, skips.pop()], dim=1), emb)
        return self.out(x)


def edm_denoiser(network: OpenAIUNet, x: Tensor, sigma: Tensor, labels: Tensor | None = None) -> Tensor:
    """D of the repository's EDM networks: EDM's scalings with sigma_data = 0.5, and the time 250 ln sigma."""
    s = sigma[:, None, None, None]
    time = (250 * sigma.double().log()).float()
    output = network(x / (s**2 + 0.25).sqrt(), time, labels)
    return 0.25 / (s**2 + 0.25) * x + 0.5 * s / (s**2 + 0.25).sqrt() * output


def consistency_function(network: OpenAIUNet, x: Tensor, sigma: Tensor, labels: Tensor | None = None) -> Tensor:
    """f of its consistency models, which is the identity at sigma = 0.002."""
    s = sigma[:, None, None, None]
    time = (250 * sigma.double().log()).float()
    output = network(x / (s**2 + 0.25).sqrt(), time, labels)
    c_skip = 0.25 / ((s - 0.002) ** 2 + 0.25)
    return c_skip * x + 0.5 * (s - 0.002) / (s**2 + 0.25).sqrt() * output
