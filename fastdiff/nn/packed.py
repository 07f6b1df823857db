"""The modules of a U-Net as inference wants them; `prepare.py` puts each in the place of one that training uses."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastdiff.nn.group_norm import GroupNorm
from fastdiff.nn.layers import ResBlock, TableRow
from fastdiff.ops.inject import inject

TRANSPOSED = {1: functional.conv_transpose1d, 2: functional.conv_transpose2d, 3: functional.conv_transpose3d}


def folded(weight: Tensor) -> Tensor:
    """The transposed convolution (in, out, 4, ...) that is nearest x2 and then the convolution (out, in, 3, ...).

    With u[j] = x[j // 2] and y[o] = sum_k w[k] u[o + k - 1], for each axis:

        y[2m]     = w0 x[m-1] + (w1 + w2) x[m]
        y[2m + 1] = (w0 + w1) x[m] + w2 x[m+1]

    and a transposed convolution of stride 2 and padding 1 is y[o] = sum_m v[o + 1 - 2m] x[m]; so
    v = [w2, w1 + w2, w0 + w1, w0]. What lies outside is 0 in both.
    """
    for axis in range(2, weight.ndim):
        w0, w1, w2 = weight.unbind(axis)
        weight = torch.stack([w2, w1 + w2, w0 + w1, w0], axis)
    return weight.transpose(0, 1)


class FoldedUp(nn.Module):
    """nearest x2, then a 3^dims convolution, as one transposed convolution of kernel 4, stride 2, padding 1.

    2^dims multiplications an output pixel and channel pair in place of 3^dims, and no map of repeated pixels.
    """

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.weight, self.bias = weight, bias

    def forward(self, x: Tensor, emb: Tensor | TableRow | None = None) -> Tensor:
        """(N, C, *spatial) to (N, C', *2 spatial)."""
        y: Tensor = TRANSPOSED[x.ndim - 2](x, self.weight, self.bias, stride=2, padding=1)
        return y


class BiasedNorm(nn.Module):
    """The norm of x + add, where add (C,) is the bias of the convolution in front."""

    def __init__(self, norm: GroupNorm, add: nn.Parameter) -> None:
        super().__init__()
        self.norm, self.add = norm, add

    def forward(self, x: Tensor, *, scale: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
        """(N, C, *spatial); see GroupNorm."""
        y: Tensor = self.norm(x, add=self.add, scale=scale, shift=shift)
        return y


class Shortcut(nn.Module):
    """W cat([x, skip], 1) + bias at every pixel: the 1x1 convolution as matrix products, without the concatenation.

        y = W[:, :C] x + bias,  then y += W[:, C:] skip

    W (outputs, channels of x and skip). Views where x and skip are both channels_last or both contiguous.
    """

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.weight, self.bias = weight, bias

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        """(N, outputs, *spatial) in x's layout."""
        images = x.is_contiguous()  # else pixels are lines of one matrix, (N L, C)
        w, z = self.weight[:, : x.shape[1]], self._matrix(x, images)
        if images:
            w = w.expand(len(x), *w.shape)
            y = torch.bmm(w, z) if self.bias is None else torch.baddbmm(self.bias[:, None], w, z)
        else:
            y = functional.linear(z, w, self.bias)
        if skip is not None:
            y = self._more(y, self.weight[:, x.shape[1] :], self._matrix(skip, images))
        if images:
            return y.view(*y.shape[:2], *x.shape[2:])
        return y.view(len(x), *x.shape[2:], y.shape[1]).movedim(-1, 1)

    @staticmethod
    def _matrix(x: Tensor, images: bool) -> Tensor:
        return x.flatten(2) if images else x.movedim(1, -1).flatten(0, -2)

    @staticmethod
    def _more(y: Tensor, w: Tensor, z: Tensor) -> Tensor:
        """y + the second product; into y's memory, but under autocast, which knows the other form only."""
        images = y.ndim == 3
        a, b = (w.expand(len(y), *w.shape), z) if images else (z, w.t())
        if torch.is_autocast_enabled(y.device.type):
            return torch.baddbmm(y, a, b) if images else torch.addmm(y, a, b)
        return y.baddbmm_(a, b) if images else y.addmm_(a, b)


class PreparedResBlock(nn.Module):
    """`block`, a ResBlock, with another way from its input to its output beside the convolutions, and another sum.

    resample or shortcut (no block of a UNet has both) stand for the block's own there; bias is that of both ways, which
    then have none.
    """

    def __init__(
        self, block: ResBlock, resample: nn.Module | None, shortcut: nn.Module | None, bias: nn.Parameter | None
    ) -> None:
        super().__init__()
        self.block, self.resample, self.shortcut, self.bias = block, resample, shortcut, bias

    def forward(self, x: Tensor, emb: Tensor | TableRow, skip: Tensor | None = None) -> Tensor:
        """See ResBlock."""
        h = self.block.branch(x, emb, skip)
        x = x if self.resample is None else self.resample(x)
        x = self.block.straight(x, skip) if self.shortcut is None else self.shortcut(x, skip)
        y: Tensor = x + h if self.bias is None else inject(h, add=self.bias, residual=x)
        return y if self.block.divisor == 1 else y / self.block.divisor
