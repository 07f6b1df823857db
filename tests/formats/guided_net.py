"""A network built and named like guided-diffusion's, as other programs have it."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class GroupNorm32(nn.GroupNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float()).type(x.dtype)


def norm(channels: int) -> nn.Module:
    return GroupNorm32(8, channels)


class Upsample(nn.Module):
    def __init__(self, channels: int, use_conv: bool) -> None:
        super().__init__()
        self.use_conv = use_conv
        if use_conv:
            self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.interpolate(x, scale_factor=2, mode="nearest")
        return self.conv(x) if self.use_conv else x


class Downsample(nn.Module):
    def __init__(self, channels: int, use_conv: bool) -> None:
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1) if use_conv else nn.AvgPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class ResBlock(nn.Module):
    def __init__(self, channels: int, emb: int, out: int, *, scale_shift: bool, way: str = "") -> None:
        super().__init__()
        self.dropout, self.use_scale_shift_norm, self.updown = 0.0, scale_shift, bool(way)
        self.in_layers = nn.Sequential(norm(channels), nn.SiLU(), nn.Conv2d(channels, out, 3, padding=1))
        kind = {"": nn.Identity, "up": lambda: Upsample(channels, False)}.get(way, lambda: Downsample(channels, False))
        self.h_upd, self.x_upd = kind(), kind()
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb, 2 * out if scale_shift else out))
        self.out_layers = nn.Sequential(norm(out), nn.SiLU(), nn.Dropout(0.0), nn.Conv2d(out, out, 3, padding=1))
        self.skip_connection = nn.Identity() if channels == out else nn.Conv2d(channels, out, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.in_layers[2](self.h_upd(self.in_layers[:2](x)))
        x = self.x_upd(x)
        e = self.emb_layers(emb)[..., None, None]
        if self.use_scale_shift_norm:
            scale, shift = e.chunk(2, 1)
            h = self.out_layers[1:](self.out_layers[0](h) * (1 + scale) + shift)
        else:
            h = self.out_layers(h + e)
        return self.skip_connection(x) + h


class QKVAttentionLegacy(nn.Module):
    def forward(self, qkv: Tensor, heads: int) -> Tensor:
        n, width, length = qkv.shape
        q, k, v = qkv.reshape(n * heads, -1, length).chunk(3, 1)
        return ((q.mT @ k / q.shape[1] ** 0.5).softmax(-1) @ v.mT).mT.reshape(n, width // 3, length)


class QKVAttention(nn.Module):
    def forward(self, qkv: Tensor, heads: int) -> Tensor:
        n, width, length = qkv.shape
        q, k, v = (part.reshape(n * heads, -1, length) for part in qkv.chunk(3, 1))
        return ((q.mT @ k / q.shape[1] ** 0.5).softmax(-1) @ v.mT).mT.reshape(n, width // 3, length)


class AttentionBlock(nn.Module):
    def __init__(self, channels: int, heads: int, new: bool) -> None:
        super().__init__()
        self.channels, self.num_heads = channels, heads
        self.norm, self.qkv = norm(channels), nn.Conv1d(channels, 3 * channels, 1)
        self.attention = QKVAttention() if new else QKVAttentionLegacy()
        self.proj_out = nn.Conv1d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        z = x.flatten(2)
        return (z + self.proj_out(self.attention(self.qkv(self.norm(z)), self.num_heads))).reshape(x.shape)


class TimestepEmbedSequential(nn.Sequential):
    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        for layer in self:
            x = layer(x, emb) if isinstance(layer, ResBlock) else layer(x)
        return x


class UNetModel(nn.Module):
    def __init__(
        self, *, mult: tuple[int, ...] = (1, 2), blocks: int = 1, attention: tuple[int, ...] = (2,), heads: int = 1,
        head_channels: int = 0, classes: int | None = None, scale_shift: bool = False, updown: bool = False,
        new: bool = False, conv: bool = True, odd: float = 1.0,
    ) -> None:  # fmt: skip
        super().__init__()
        width, emb = 32, 128
        self.model_channels, self.num_res_blocks, self.attention_resolutions = width, blocks, attention
        self.channel_mult, self.conv_resample, self.num_classes, self.odd = mult, conv, classes, odd
        self.time_embed = nn.Sequential(nn.Linear(width, emb), nn.SiLU(), nn.Linear(emb, emb))
        if classes is not None:
            self.label_emb = nn.Embedding(classes, emb)

        def res(inputs: int, outputs: int, way: str = "") -> nn.Module:
            return ResBlock(inputs, emb, outputs, scale_shift=scale_shift, way=way)

        def attend(c: int, ds: int) -> list[nn.Module]:
            here = ds in attention
            return [AttentionBlock(c, c // head_channels if head_channels else heads, new)] if here else []

        def resample(c: int, way: str) -> nn.Module:
            return res(c, c, way) if updown else Upsample(c, conv) if way == "up" else Downsample(c, conv)

        c, ds, skips = width * mult[0], 1, [width * mult[0]]
        self.input_blocks = nn.ModuleList([TimestepEmbedSequential(nn.Conv2d(3, c, 3, padding=1))])
        for level, m in enumerate(mult):
            for _ in range(blocks):
                self.input_blocks.append(TimestepEmbedSequential(res(c, width * m), *attend(width * m, ds)))
                c = width * m
                skips.append(c)
            if level < len(mult) - 1:
                self.input_blocks.append(TimestepEmbedSequential(resample(c, "down")))
                skips.append(c)
                ds *= 2
        middle = AttentionBlock(c, c // head_channels if head_channels else heads, new)
        self.middle_block = TimestepEmbedSequential(res(c, c), middle, res(c, c))
        self.output_blocks = nn.ModuleList()
        for level, m in reversed(list(enumerate(mult))):
            for i in range(blocks + 1):
                layers = [res(c + skips.pop(), width * m), *attend(width * m, ds)]
                c = width * m
                if level and i == blocks:
                    layers.append(resample(c, "up"))
                    ds //= 2
                self.output_blocks.append(TimestepEmbedSequential(*layers))
        self.out = nn.Sequential(norm(c), nn.SiLU(), nn.Conv2d(c, 6, 3, padding=1))

    def forward(self, x: Tensor, timesteps: Tensor, y: Tensor | None = None) -> Tensor:
        half = self.model_channels // 2
        angle = timesteps[:, None].float() * 10000.0 ** (-torch.arange(half) / half)
        emb = self.time_embed(torch.cat([angle.cos(), angle.sin()], 1).to(x.dtype))
        emb = emb if y is None else emb + self.label_emb(y)
        h, skips = x, []
        for block in self.input_blocks:
            h = block(h, emb)
            skips.append(h)
        h = self.odd * self.middle_block(h, emb)
        for block in self.output_blocks:
            h = block(torch.cat([h, skips.pop()], 1), emb)
        return self.out(h)


def peer(**given: Any) -> UNetModel:
    """A random net in which no parameter is 0 or 1."""
    net = UNetModel(**given).eval()
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=g) / (p[0].numel() if p.ndim > 1 else 4) ** 0.5 + (p.ndim == 1))
    return net.requires_grad_(False)
