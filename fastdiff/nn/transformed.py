"""The transformer between two convolutions of ours, for CPUs, see `convolved.py`."""

from __future__ import annotations

from torch import Tensor, nn

from fastdiff.nn.attended import image, tokens
from fastdiff.nn.convolved import Convolved
from fastdiff.nn.layers import Map, as_map
from fastdiff.ops.tape import beside


class ConvolvedTransformer(nn.Module):
    """Transformer between two 1x1 convolutions of ours, norm and residual among them."""

    def __init__(self, inp: Convolved, blocks: nn.ModuleList, out: Convolved) -> None:
        super().__init__()
        self.inp, self.blocks, self.out = inp, blocks, out

    def forward(self, x: Tensor | Map, context: Tensor) -> Map:
        """(N, channels, H, W); context (N, M, context_channels)."""
        x = as_map(x)
        z = tokens(self.inp(x, measure=False).x)
        for block in self.blocks:
            z = beside(block, z, context)
        y: Map = self.out(image(z, x.x), residual=x.x)
        return y
