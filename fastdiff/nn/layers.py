"""The modules that a U-Net is made of: residual block, attention, resampling, embeddings.

Every GroupNorm, the SiLU behind it, the time embedding around it and the skip concatenation in front of it are one op,
`fastdiff.ops.group_norm_silu`. `dims` is the number of spatial axes: 1, 2 or 3.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastdiff.nn.group_norm import GroupNorm
from fastdiff.ops.tape import beside
from fastdiff.ops.time_embed import time_embed

CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
POOL = {1: functional.avg_pool1d, 2: functional.avg_pool2d, 3: functional.avg_pool3d}


def conv(dims: int, inputs: int, outputs: int, size: int, *, stride: int = 1, padding: int | None = None) -> nn.Module:
    """A convolution over `dims` axes; the default padding keeps the spatial size at stride 1."""
    return CONV[dims](inputs, outputs, size, stride=stride, padding=size // 2 if padding is None else padding)


def zero(module: nn.Module) -> nn.Module:
    """`module` with all parameters set to 0, so that the branch it ends starts as nothing (Ho 2020, appendix B)."""
    for p in module.parameters():
        nn.init.zeros_(p)
    return module


class TableRow(NamedTuple):
    """What ResBlocks get in place of the embedding where their projections of it were made before, in a table."""

    row: Tensor
    """(columns,) for all images, or (N, columns); each ResBlock knows its own columns."""


class Deep(NamedTuple):
    """What runs less often than the rest (DeepCache, Ma 2024): all below the last `stages` of the way up."""

    stages: int
    kept: Tensor
    """`net.deep_shape(x.shape, stages)`, what the deep part last gave to the stages above it."""
    fresh: bool
    """Whether the deep part runs, and leaves its result in `kept`; else it is read from there."""


class Map(NamedTuple):
    """A map (N, C, H, W), and the mean and variance of each of its channels (N, C, 2) where they are known."""

    x: Tensor
    moments: Tensor | None = None


def as_map(x: Tensor | Map) -> Map:
    """x itself, or with moments yet to be taken."""
    return Map(x) if isinstance(x, Tensor) else x


def added(x: Tensor | Map, r: Tensor) -> Tensor:
    """x + r; the moments of the sum are not known."""
    return beside(torch.add, as_map(x).x, r.to(as_map(x).x.dtype))


class Pool(nn.Module):
    """Halves every spatial axis by the mean of 2^dims neighbours."""

    def __init__(self, dims: int) -> None:
        super().__init__()
        self.dims = dims

    def forward(self, x: Tensor, emb: Tensor | TableRow | None = None) -> Tensor:
        """(N, C, *spatial) to (N, C, *spatial / 2)."""
        y: Tensor = POOL[self.dims](x, 2)
        return y


class Nearest(nn.Module):
    """Doubles every spatial axis by repeating each value."""

    def forward(self, x: Tensor, emb: Tensor | TableRow | None = None) -> Tensor:
        """(N, C, *spatial) to (N, C, *2 spatial)."""
        return functional.interpolate(x, scale_factor=2.0, mode="nearest")


class Down(nn.Module):
    """Halves every spatial axis by a 3^dims convolution of stride 2.

    asymmetric: pad one zero behind each axis (DDPM's TensorFlow "SAME") in place of one on both sides.
    """

    def __init__(self, channels: int, *, dims: int, asymmetric: bool = False) -> None:
        super().__init__()
        self.pad = (0, 1) * dims if asymmetric else None
        self.conv = conv(dims, channels, channels, 3, stride=2, padding=0 if asymmetric else 1)

    def forward(self, x: Tensor, emb: Tensor | TableRow | None = None) -> Tensor:
        """(N, C, *spatial) to (N, C, *spatial / 2)."""
        y: Tensor = self.conv(x if self.pad is None else functional.pad(x, self.pad))
        return y


class Up(nn.Module):
    """Doubles every spatial axis by repetition, then a 3^dims convolution."""

    def __init__(self, channels: int, *, dims: int) -> None:
        super().__init__()
        self.nearest = Nearest()
        self.conv = conv(dims, channels, channels, 3)

    def forward(self, x: Tensor, emb: Tensor | TableRow | None = None) -> Tensor:
        """(N, C, *spatial) to (N, C, *2 spatial)."""
        y: Tensor = self.conv(self.nearest(x))
        return y


class ResBlock(nn.Module):
    """y = (shortcut(z) + conv2(n2(conv1(resample(n1(z)))))) / divisor,  z = cat([x, skip], 1) where a skip is given.

    n1, n2 are GroupNorm + SiLU; the projected embedding e = time(emb) enters n2: added before the norm, or, with
    `scale_shift`, as (scale, shift) behind it. `resample`: "up" or "down" resamples both branches (Dhariwal & Nichol
    2021, after BigGAN), None neither. emb comes with its SiLU already applied, or as a line of a table of all blocks'
    e, in which this one has `columns`. inputs counts z's channels.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        dims: int,
        time_channels: int,
        groups: int,
        eps: float = 1e-5,
        dropout: float = 0.0,
        scale_shift: bool = False,
        resample: str | None = None,
        divisor: float = 1.0,
    ) -> None:
        super().__init__()
        self.scale_shift, self.divisor = scale_shift, divisor
        self.columns: tuple[int, int] | None = None
        self.norm1 = GroupNorm(groups, inputs, eps, act="silu")
        self.resample = {"up": Nearest(), "down": Pool(dims), None: None}[resample]
        self.conv1 = conv(dims, inputs, outputs, 3)
        self.time = nn.Linear(time_channels, 2 * outputs if scale_shift else outputs)
        self.norm2 = GroupNorm(groups, outputs, eps, act="silu")
        self.dropout = nn.Dropout(dropout)
        self.conv2 = zero(conv(dims, outputs, outputs, 3))
        self.shortcut = None if inputs == outputs else conv(dims, inputs, outputs, 1)

    def forward(self, x: Tensor, emb: Tensor | TableRow, skip: Tensor | None = None) -> Tensor:
        """(N, outputs, *spatial), resampled; x and skip have `inputs` channels together, emb is (N, time_channels)."""
        h = self.branch(x, emb, skip)
        y: Tensor = self.straight(x, skip) + h
        return y if self.divisor == 1 else y / self.divisor

    def branch(self, x: Tensor, emb: Tensor | TableRow, skip: Tensor | None = None) -> Tensor:
        """conv2(n2(conv1(resample(n1(z)))))"""
        h = self.norm1(x, x2=skip)
        h = self.conv1(h if self.resample is None else self.resample(h))
        e = self.time(emb) if isinstance(emb, Tensor) else self.cut(emb)
        if self.scale_shift:
            scale, shift = e.chunk(2, -1)
            h = self.norm2(h, scale=scale, shift=shift)
        else:
            h = self.norm2(h, add=e)
        y: Tensor = self.conv2(self.dropout(h))
        return y

    def straight(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        """shortcut(resample(z))"""
        x = x if skip is None else torch.cat([x, skip], 1)
        x = x if self.resample is None else self.resample(x)
        return x if self.shortcut is None else self.shortcut(x)

    def cut(self, line: TableRow) -> Tensor:
        """e out of a line of the table."""
        if self.columns is None:
            raise ValueError(
                "ResBlock: emb is a TableRow; only the blocks of a UNet have columns in one, pass a tensor"
            )
        return line.row[..., slice(*self.columns)]


def heads_of(name: str, channels: int, heads: int | None, head_channels: int | None) -> int:
    """The number of heads, given itself or by the channels of one, 1 for neither; `name` is who raises ValueError."""
    found = heads or (channels // head_channels if head_channels else 1)
    if found < 1 or channels % (head_channels or found):
        given = f"head_channels={head_channels}" if head_channels else f"heads={heads}"
        raise ValueError(f"{name}: {given} does not divide {channels} channels; pass a divisor")
    return found


class Attention(nn.Module):
    """y = (x + out(softmax(q k^T / sqrt(d)) v)) / divisor over all pixels,  [q, k, v] = qkv(norm(x)).

    heads, or head_channels (then heads = channels / head_channels), or neither: one head. The rows of `qkv` are q's
    channels, then k's, then v's, each ordered by head. groups=0 leaves the norm out.
    """

    def __init__(
        self,
        channels: int,
        *,
        groups: int,
        heads: int | None = None,
        head_channels: int | None = None,
        eps: float = 1e-5,
        divisor: float = 1.0,
    ) -> None:
        super().__init__()
        self.heads = heads_of("Attention", channels, heads, head_channels)
        self.divisor = divisor
        self.norm = GroupNorm(groups, channels, eps) if groups else None
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = zero(nn.Linear(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        """(N, channels, *spatial)."""
        h = x if self.norm is None else self.norm(x)
        tokens = h.flatten(2).transpose(1, 2)  # (N, L, C), a view
        q, k, v = self.qkv(tokens).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (N, heads, L, d) each
        h = functional.scaled_dot_product_attention(q, k, v)
        h = self.out(h.transpose(1, 2).flatten(2)).transpose(1, 2)
        y: Tensor = x + h.reshape(x.shape)
        return y if self.divisor == 1 else y / self.divisor


class Stage(nn.Module):
    """ResBlock, then attention, then a resampling, each of the last two where given; `skip` joins in the ResBlock."""

    def __init__(self, res: ResBlock, attention: nn.Module | None = None, resample: nn.Module | None = None) -> None:
        super().__init__()
        self.res, self.attention, self.resample = res, attention, resample

    def forward(
        self, x: Tensor, emb: Tensor | TableRow, skip: Tensor | None = None, context: Tensor | None = None
    ) -> Tensor:
        """(N, outputs, *spatial), resampled; context is the attention's where it is a Transformer."""
        x = self.res(x, emb, skip)
        if self.attention is not None:
            x = self.attention(x) if context is None else self.attention(x, context)
        return x if self.resample is None else self.resample(x, emb)


class Projection(nn.Module):
    """Linear, SiLU, Linear: of given features (N, inputs) to (N, outputs)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.linear1 = nn.Linear(inputs, outputs)
        self.linear2 = nn.Linear(outputs, outputs)

    def forward(self, v: Tensor) -> Tensor:
        """(N, outputs) in the parameters' dtype."""
        y: Tensor = self.linear2(functional.silu(self.linear1(v.to(self.linear1.weight.dtype))))
        return y


class Sinusoid(nn.Module):
    """Sinusoidal features of time_scale * t, then Linear, SiLU, Linear: t (N,) to (N, outputs).

    The features are computed in float32 (float64 when t is) and cast to the parameters' dtype behind.
    """

    def __init__(
        self,
        features: int,
        outputs: int,
        *,
        time_scale: float = 1.0,
        max_period: float = 10000.0,
        flip: bool = True,
        shift: float = 0.0,
    ) -> None:
        super().__init__()
        self.features, self.time_scale = features, time_scale
        self.max_period, self.flip, self.shift = max_period, flip, shift
        self.linear1 = nn.Linear(features, outputs)
        self.linear2 = nn.Linear(outputs, outputs)

    def forward(self, t: Tensor) -> Tensor:
        """(N, outputs) in the parameters' dtype; t (N,) integer or real."""
        e = time_embed(
            t,
            self.features,
            max_period=self.max_period,
            flip=self.flip,
            shift=self.shift,
            scale=self.time_scale,
            dtype=self.linear1.weight.dtype,
        )
        y: Tensor = self.linear2(functional.silu(self.linear1(e)))
        return y
