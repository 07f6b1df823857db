"""The transformer on linear layers and attention of ours, for CPUs, see `convolved.py`."""

from __future__ import annotations

from torch import Tensor, nn

from fastdiff.nn.attended import image, tokens
from fastdiff.nn.convolved import Convolved
from fastdiff.nn.layers import Map, as_map
from fastdiff.ops.attention import attended
from fastdiff.ops.norm_linear import PackedLinear, projected


class Projected(nn.Module):
    """y = linear(norm(z)) + residual, with a gate a gelu(g) of its halves; norm where a LayerNorm is given.

    weight as `fastdiff.ops.pack_linear` packs it.
    """

    def __init__(
        self,
        weight: nn.Parameter,
        bias: nn.Parameter | None,
        outputs: int,
        norm: nn.LayerNorm | None = None,
        *,
        gate: bool = False,
    ) -> None:
        super().__init__()
        self.weight, self.bias, self.outputs, self.gate = weight, bias, outputs, gate
        self.norm_weight = self.norm_bias = None
        self.eps = 0.0
        if norm is not None:
            self.norm_weight, self.norm_bias, self.eps = norm.weight, norm.bias, norm.eps

    def forward(self, z: Tensor, residual: Tensor | None = None) -> Tensor:
        """(N, L, outputs)."""
        return projected(
            z,
            PackedLinear(self.weight, self.outputs, self.gate),
            self.bias,
            norm=self.norm_weight is not None,
            norm_weight=self.norm_weight,
            norm_bias=self.norm_bias,
            eps=self.eps,
            residual=residual,
        )


class ProjectedBlock(nn.Module):
    """TransformerBlock on seven linear layers of ours."""

    def __init__(
        self,
        heads: int,
        *,
        qkv: Projected,
        self_out: Projected,
        q: Projected,
        kv: Projected,
        cross_out: Projected,
        gate: Projected,
        feed_out: Projected,
    ) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.self_out = qkv, self_out
        self.q, self.kv, self.cross_out = q, kv, cross_out
        self.gate, self.feed_out = gate, feed_out

    def forward(self, z: Tensor, context: Tensor) -> Tensor:
        """(N, L, channels); context (N, M, context_channels)."""
        q, k, v = self.qkv(z).chunk(3, 2)
        z = self.self_out(attended(q, k, v, self.heads)[0], z)
        k, v = self.kv(context).chunk(2, 2)
        z = self.cross_out(attended(self.q(z), k, v, self.heads)[0], z)
        y: Tensor = self.feed_out(self.gate(z), z)
        return y


class ConvolvedTransformer(nn.Module):
    """Transformer between two 1x1 convolutions of ours, norm and residual among them."""

    def __init__(self, inp: Convolved, blocks: list[ProjectedBlock], out: Convolved) -> None:
        super().__init__()
        self.inp, self.blocks, self.out = inp, nn.ModuleList(blocks), out

    def forward(self, x: Tensor | Map, context: Tensor) -> Map:
        """(N, channels, H, W); context (N, M, context_channels)."""
        x = as_map(x)
        z = tokens(self.inp(x, measure=False).x)
        for block in self.blocks:
            z = block(z, context)
        y: Map = self.out(image(z, x.x), residual=x.x)
        return y
