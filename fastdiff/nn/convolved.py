"""The modules of a U-Net on our own convolutions, for CPUs: between two of them a map goes with its moments.

Each convolution takes the norm in front of it and the sums behind it into its own passes, and leaves the mean and the
variance of each channel for the norm of the next one. `prepare.py` puts these in the place of the modules of training.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fastdiff.nn.group_norm import GroupNorm
from fastdiff.nn.layers import Map, Pool, ResBlock, TableRow, as_map
from fastdiff.ops.norm_silu_conv import Packed, convolved
from fastdiff.ops.tape import beside


class Convolved(nn.Module):
    """y = conv(silu(norm([x, skip]))) + bias + add + residual; norm and SiLU where a GroupNorm is given.

    weight as `fastdiff.ops.pack` packs it; options: those of `fastdiff.ops.norm_silu_conv` that are the layer's.
    """

    def __init__(
        self,
        weight: nn.Parameter,
        bias: nn.Parameter | None,
        outputs: int,
        size: int,
        norm: GroupNorm | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        self.weight, self.bias, self.outputs, self.size = weight, bias, outputs, size
        self.norm_weight = self.norm_bias = None
        self.options = options
        if norm is not None:
            self.norm_weight, self.norm_bias = norm.weight, norm.bias
            self.options = {"groups": norm.num_groups, "eps": norm.eps, "act": bool(norm.act), **options}

    def forward(
        self,
        x: Tensor | Map,
        emb: Tensor | TableRow | None = None,
        *,
        skip: Tensor | Map | None = None,
        add: Tensor | None = None,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
        residual: Tensor | None = None,
        measure: bool = True,
    ) -> Map:
        """(N, outputs, H', W'), with its moments where measure; emb is not looked at, as in any resampling."""
        x, skip = as_map(x), None if skip is None else as_map(skip)
        y, moments = convolved(
            x.x,
            Packed(self.weight, self.outputs, self.size),
            self.bias,
            **self.options,
            norm_weight=self.norm_weight,
            norm_bias=self.norm_bias,
            x2=None if skip is None else skip.x,
            moments=x.moments,
            moments2=None if skip is None else skip.moments,
            add=add,
            scale=scale,
            shift=shift,
            residual=residual,
            measure=measure,
        )
        return Map(y, moments if measure else None)


class Last(nn.Module):
    """The last convolution, whose result is a tensor again."""

    def __init__(self, conv: Convolved) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor | Map) -> Tensor:
        """(N, outputs, H, W)."""
        F: Map = self.conv(x, measure=False)
        return F.x


class Centered(nn.Module):
    """conv(2 x - 1)"""

    def __init__(self, conv: Convolved) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor) -> Map:
        """(N, outputs, H, W)."""
        y: Map = self.conv(beside(lambda z: 2 * z - 1, x))
        return y


class Resampled(nn.Module):
    """Pool or Nearest of a map; its moments are not known."""

    def __init__(self, resample: nn.Module) -> None:
        super().__init__()
        self.resample = resample

    def forward(self, x: Tensor | Map, emb: Tensor | TableRow | None = None) -> Map:
        """See Pool and Nearest."""
        return Map(beside(self.resample, as_map(x).x))


class Passed(nn.Module):
    """What stands where a norm was that the next convolution has taken over."""

    def forward(self, x: Map) -> Map:
        """x."""
        return x


class ConvolvedResBlock(nn.Module):
    """ResBlock on two or three convolutions of ours; one that halves pools behind its norm by itself.

    block keeps what the convolutions do not take over: time, columns, and for a pooling block norm1.
    """

    def __init__(self, block: ResBlock, conv1: Convolved, conv2: Convolved, shortcut: Convolved | None) -> None:
        super().__init__()
        self.block, self.conv1, self.conv2, self.shortcut = block, conv1, conv2, shortcut

    def forward(self, x: Tensor | Map, emb: Tensor | TableRow, skip: Tensor | Map | None = None) -> Map:
        """See ResBlock."""
        block: Any = self.block
        x = as_map(x)
        e = block.time(emb) if isinstance(emb, Tensor) else block.cut(emb)
        scale, shift = e.chunk(2, -1) if block.scale_shift else (None, None)
        add = None if block.scale_shift else e
        straight = x.x if block.resample is None else beside(block.resample, x.x)
        if isinstance(block.resample, Pool):
            h = self.conv1(beside(lambda z: block.resample(block.norm1(z)), x.x), add=add)
        else:
            h = self.conv1(x, skip=skip, add=add)
        if self.shortcut is not None:
            straight = self.shortcut(straight, skip=skip, measure=False).x
        y: Map = self.conv2(h, scale=scale, shift=shift, residual=straight, measure=block.divisor == 1)
        return divided(y, block.divisor)


def divided(y: Map, divisor: float) -> Map:
    """y / divisor; only one itself keeps the moments."""
    return y if divisor == 1 else Map(beside(lambda z: z / divisor, y.x))
