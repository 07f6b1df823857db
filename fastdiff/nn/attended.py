"""Attention between two convolutions of ours, for CPUs, see `convolved.py`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastdiff.nn.convolved import Convolved, divided
from fastdiff.nn.layers import Attention, Map, as_map
from fastdiff.ops.attention import attended


class ConvolvedAttention(nn.Module):
    """Attention on two 1x1 convolutions of ours, norm and residual among them."""

    def __init__(self, attention: Attention, qkv: Convolved, out: Convolved) -> None:
        super().__init__()
        self.heads, self.divisor, self.qkv, self.out = attention.heads, attention.divisor, qkv, out

    def forward(self, x: Tensor | Map) -> Map:
        """(N, channels, H, W)."""
        x = as_map(x)
        q, k, v = tokens(self.qkv(x, measure=False).x).chunk(3, 2)
        h, _ = attended(q, k, v, self.heads)
        return divided(self.out(image(h, x.x), residual=x.x, measure=self.divisor == 1), self.divisor)


class OneHead(nn.Module):
    """Attention of one head with two of its four projections: as matrices, the others go into these two.

        q k^T = (h Wq^T + bq) (h Wk^T + bk)^T = (h Wq^T Wk + bq Wk) h^T + what is the same for all keys
        out(softmax(s) v) = softmax(s) (h (Wo Wv)^T + Wo bv + bo),    since the rows of softmax(s) sum to one

    qv: the norm and both products, h appended.
    """

    def __init__(self, attention: Attention, qv: Convolved) -> None:
        super().__init__()
        self.divisor, self.qv = attention.divisor, qv

    def forward(self, x: Tensor | Map) -> Map:
        """(N, channels, H, W)."""
        x = as_map(x)
        q, v, h = tokens(self.qv(x, measure=False).x).chunk(3, 2)
        y, moments = attended(q, h, v, 1, tokens(x.x), measure=self.divisor == 1)
        return divided(Map(image(y, x.x), moments), self.divisor)


def folded_weight(qkv: Tensor, out: Tensor) -> Tensor:
    """Weight (2 C, C) of the projections of `OneHead`, float64, from those of an Attention."""
    wq, wk, wv = qkv.double().chunk(3)
    return torch.cat([wk.t() @ wq, out.double() @ wv])


def folded_bias(qkv: Tensor, qkv_bias: Tensor, out: Tensor, out_bias: Tensor) -> Tensor:
    """Bias (2 C,) of the projections of `OneHead`, float64, from weights and biases of an Attention."""
    _, wk, _ = qkv.double().chunk(3)
    bq, _, bv = qkv_bias.double().chunk(3)
    return torch.cat([bq @ wk, out.double() @ bv + out_bias.double()])


def tokens(x: Tensor) -> Tensor:
    """(N, C, H, W), channels_last, as (N, L, C), a view."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def image(y: Tensor, like: Tensor) -> Tensor:
    """The inverse of `tokens`, of the size of `like`."""
    return y.view(len(y), *like.shape[2:], y.shape[2]).permute(0, 3, 1, 2)
