"""The transformer between the residual blocks of a text-conditional U-Net: every pixel sees all pixels and the context.

    z = inp(norm(x)) as tokens;    depth times:  z += self(z);  z += cross(z, context);  z += feed(z);    y = x + out(z)

Each of the three has its LayerNorm in front. Sources: Vaswani 2017; Rombach 2022 (latent diffusion), section 3.3;
Shazeer 2020 (GEGLU).
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from fastdiff.nn.group_norm import GroupNorm
from fastdiff.nn.layers import heads_of, zero

NORM_EPS = 1e-6
"""Of the norm in front of all; Stable Diffusion's, whatever its residual blocks have."""


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """softmax(q k^T / sqrt(d)) v by heads; q (N, L, C), k and v (N, M, C)."""
    q, k, v = (part.view(*part.shape[:2], heads, -1).transpose(1, 2) for part in (q, k, v))  # (N, heads, L, d) each
    return functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class SelfAttention(nn.Module):
    """z + out(attend(qkv(norm(z)))); the rows of `qkv` are q's channels, then k's, then v's, each ordered by head."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(channels)
        self.qkv = nn.Linear(channels, 3 * channels, bias=False)
        self.out = nn.Linear(channels, channels)

    def forward(self, z: Tensor) -> Tensor:
        """(N, L, channels)."""
        q, k, v = self.qkv(self.norm(z)).chunk(3, 2)
        y: Tensor = z + self.out(attend(q, k, v, self.heads))
        return y


class CrossAttention(nn.Module):
    """z + out(attend(q(norm(z)), kv(context))); the rows of `kv` are k's channels, then v's."""

    def __init__(self, channels: int, context_channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(channels)
        self.q = nn.Linear(channels, channels, bias=False)
        self.kv = nn.Linear(context_channels, 2 * channels, bias=False)
        self.out = nn.Linear(channels, channels)

    def forward(self, z: Tensor, context: Tensor) -> Tensor:
        """(N, L, channels); context (N, M, context_channels)."""
        k, v = self.kv(context).chunk(2, 2)
        y: Tensor = z + self.out(attend(self.q(self.norm(z)), k, v, self.heads))
        return y


class FeedForward(nn.Module):
    """z + out(a gelu(g)),  [a, g] = gate(norm(z)), with four times as many channels each."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.gate = nn.Linear(channels, 8 * channels)
        self.out = nn.Linear(4 * channels, channels)

    def forward(self, z: Tensor) -> Tensor:
        """(N, L, channels)."""
        a, g = self.gate(self.norm(z)).chunk(2, 2)
        y: Tensor = z + self.out(a * functional.gelu(g))
        return y


class TransformerBlock(nn.Module):
    """Self-attention, attention to the context, feed-forward; each adds to z."""

    def __init__(self, channels: int, context_channels: int, heads: int) -> None:
        super().__init__()
        self.self_attention = SelfAttention(channels, heads)
        self.cross = CrossAttention(channels, context_channels, heads)
        self.feed = FeedForward(channels)

    def forward(self, z: Tensor, context: Tensor) -> Tensor:
        """(N, L, channels)."""
        z = self.cross(self.self_attention(z), context)
        y: Tensor = self.feed(z)
        return y


class Transformer(nn.Module):
    """y = x + out(blocks(inp(norm(x)), context)), see the head of this file; `inp` and `out` are 1x1 convolutions.

    heads, or head_channels (then heads = channels / head_channels), or neither: one head.
    """

    def __init__(
        self,
        channels: int,
        *,
        context_channels: int,
        groups: int,
        depth: int = 1,
        heads: int | None = None,
        head_channels: int | None = None,
    ) -> None:
        super().__init__()
        heads = heads_of("Transformer", channels, heads, head_channels)
        self.norm = GroupNorm(groups, channels, NORM_EPS)
        self.inp = nn.Linear(channels, channels)
        self.blocks = nn.ModuleList(TransformerBlock(channels, context_channels, heads) for _ in range(depth))
        self.out = zero(nn.Linear(channels, channels))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """(N, channels, *spatial); context (N, M, context_channels)."""
        z = self.inp(self.norm(x).flatten(2).transpose(1, 2))  # (N, L, C)
        for block in self.blocks:
            z = block(z, context)
        y: Tensor = x + self.out(z).transpose(1, 2).reshape(x.shape)
        return y
