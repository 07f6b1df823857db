"""The rival where diffusers has none: a U-Net of torch's own modules, as anybody writes it, with a given net's weights.

GroupNorm, SiLU, cat, addition: one module or function each, nothing of fastdiff's.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import fastdiff as fd
from fastdiff.nn.layers import Attention, ResBlock, Sinusoid, Stage


def _norm(given: nn.GroupNorm) -> nn.GroupNorm:
    """torch's own module with the parameters of ours."""
    made = nn.GroupNorm(given.num_groups, given.num_channels, given.eps)
    made.load_state_dict(given.state_dict())
    return made


class PlainTime(nn.Module):
    """Linear, SiLU, Linear of the sinusoidal features of t."""

    def __init__(self, given: Sinusoid) -> None:
        super().__init__()
        half = given.features // 2
        rates = -math.log(given.max_period) * torch.arange(half, dtype=torch.float32) / (half - given.shift)
        self.rates = rates.exp() * given.time_scale
        self.flip = given.flip
        self.linear1, self.linear2 = copy.deepcopy(given.linear1), copy.deepcopy(given.linear2)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        # no buffer: those are cast with the weights
        super()._apply(fn, recurse)
        self.rates = self.rates.to(self.linear1.weight.device)
        return self

    def forward(self, t: Tensor) -> Tensor:
        """(N, outputs); the features are made in fp32, whatever the network computes in."""
        angles = t.float()[:, None] * self.rates
        parts = (angles.cos(), angles.sin()) if self.flip else (angles.sin(), angles.cos())
        e = torch.cat(parts, 1).to(self.linear1.weight.dtype)
        y: Tensor = self.linear2(functional.silu(self.linear1(e)))
        return y


class PlainResBlock(nn.Module):
    """conv(silu(norm)) twice, the time embedding between them, a shortcut around them."""

    def __init__(self, given: ResBlock) -> None:
        super().__init__()
        self.scale_shift = given.scale_shift
        self.norm1, self.norm2 = _norm(given.norm1), _norm(given.norm2)
        self.conv1, self.conv2, self.time = (copy.deepcopy(m) for m in (given.conv1, given.conv2, given.time))
        self.resample, self.shortcut = copy.deepcopy(given.resample), copy.deepcopy(given.shortcut)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """(N, outputs, H, W), resampled."""
        h = functional.silu(self.norm1(x))
        if self.resample is not None:
            h, x = self.resample(h), self.resample(x)
        h = self.conv1(h)
        e = self.time(emb)[:, :, None, None]
        if self.scale_shift:
            scale, shift = e.chunk(2, 1)
            h = functional.silu(self.norm2(h) * (1 + scale) + shift)
        else:
            h = functional.silu(self.norm2(h + e))
        y: Tensor = self.conv2(h) + (x if self.shortcut is None else self.shortcut(x))
        return y


class PlainAttention(nn.Module):
    """One product for q, k and v, scaled_dot_product_attention, one product behind it."""

    def __init__(self, given: Attention) -> None:
        super().__init__()
        assert given.norm is not None
        self.heads, self.norm = given.heads, _norm(given.norm)
        self.qkv, self.out = copy.deepcopy(given.qkv), copy.deepcopy(given.out)

    def forward(self, x: Tensor) -> Tensor:
        """(N, channels, H, W)."""
        tokens = self.norm(x).flatten(2).transpose(1, 2)
        # no more than four axes at a time: ncnn has no more
        q, k, v = (part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in self.qkv(tokens).chunk(3, 2))
        h = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        y: Tensor = x + self.out(h).transpose(1, 2).reshape(x.shape)
        return y


class PlainStage(nn.Module):
    """A residual block, attention and a resampling, as far as they are there."""

    def __init__(self, given: nn.Module) -> None:
        super().__init__()
        alone = not isinstance(given, Stage)
        res, attention, resample = (given, None, None) if alone else (given.res, given.attention, given.resample)
        self.res = _plain(res)
        self.attention = None if attention is None else PlainAttention(attention)
        self.resample = None if resample is None else _plain(resample)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """(N, outputs, H, W)."""
        for module in (self.res, self.attention, self.resample):
            if module is not None:
                x = module(x, emb) if isinstance(module, PlainResBlock) else module(x)
        return x


def _plain(given: nn.Module) -> nn.Module:
    """A residual block anew; convolutions, pooling and repetition are torch's own already."""
    return PlainResBlock(given) if isinstance(given, ResBlock) else copy.deepcopy(given)


class PlainUNet(nn.Module):
    """F = net(x, t, cond) of the weights of `given`, a fd.UNet for images with labels or none."""

    def __init__(self, given: fd.UNet) -> None:
        super().__init__()
        assert given.dims == 2
        assert given.condition == "label"
        assert not given.center_input
        assert all(block.divisor == 1 for block in given.res_blocks())
        self.time, self.label = PlainTime(given.time), copy.deepcopy(given.cond)
        self.stem, self.norm, self.out = copy.deepcopy(given.stem), _norm(given.norm), copy.deepcopy(given.out)
        self.down, self.middle, self.up = (
            nn.ModuleList(PlainStage(stage) for stage in part) for part in (given.down, given.middle, given.up)
        )

    def forward(self, x: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
        """F (N, out, H, W)."""
        emb = self.time(t)
        if self.label is not None:
            emb = emb + self.label(cond)
        emb = functional.silu(emb)
        h = self.stem(x)
        skips = [h]
        for stage in self.down:
            h = stage(h, emb)
            skips.append(h)
        for stage in self.middle:
            h = stage(h, emb)
        for stage in self.up:
            h = stage(torch.cat([h, skips.pop()], 1), emb)
        F: Tensor = self.out(functional.silu(self.norm(h)))
        return F
