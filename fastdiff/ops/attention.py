"""Attention of all pixels to all pixels, or to other tokens, between its projections.

    y = softmax(q k^T / sqrt(d)) v + residual

Every head by itself. On CPUs it is C++: some queries at a time see all keys, and all is read as the projection left it.

Sources: Vaswani 2017, equation 1; Milakov & Gimelshein 2018 (a softmax whose scores come in blocks).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastdiff.ops import dispatch, library
from fastdiff.ops.norm_silu_conv import moments_ref


def attention_ref(
    q: Tensor, k: Tensor, v: Tensor, heads: int, residual: Tensor | None = None, *, measure: bool = False
) -> tuple[Tensor, Tensor]:
    """The formula above in plain PyTorch, and the result's mean and variance (N, C, 2) where asked for."""
    n, _, channels = q.shape
    own = heads, channels // heads
    # (N, heads, L, d), and k and v (N, heads, M, d)
    q, k, v = (x.reshape(n, x.shape[1], *own).transpose(1, 2) for x in (q, k, v))
    # torch's fused one has no second derivative on CPUs, and none in forward mode
    y: Tensor = (q @ k.mT / q.shape[3] ** 0.5).softmax(3) @ v
    y = y.transpose(1, 2).flatten(2)
    y = y if residual is None else y + residual
    return y, moments_ref(y.mT) if measure else y.new_empty(0, dtype=torch.float64)


def _fake(q: Tensor, k: Tensor, v: Tensor, heads: int, residual: Tensor | None, measure: bool) -> tuple[Tensor, Tensor]:
    n, _, channels = q.shape
    return q.new_empty(q.shape), q.new_empty((n, channels, 2) if measure else (0,), dtype=torch.float64)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, ctx.heads, residual, _ = inputs
    ctx.save_for_backward(q, k, v, residual)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, dy: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    """By the formula in torch ops, which can be differentiated again."""

    def formula(q: Tensor, k: Tensor, v: Tensor, residual: Tensor | None) -> Tensor:
        return attention_ref(q, k, v, ctx.heads, residual)[0]

    q, k, v, residual = library.grads_of(formula, ctx.saved_tensors, dy)
    return q, k, v, None, residual, None


def attention(qkv: Tensor, heads: int = 1) -> Tensor:
    """softmax(q k^T / sqrt(d)) v by heads, see the head of this file.

    qkv (N, L, 3 C): q's channels, then k's, then v's, each ordered by head. Returns (N, L, C). Twice differentiable.
    Raises ValueError where 3 heads do not divide the channels, or there are none. Vaswani 2017.
    """
    if qkv.ndim != 3 or heads < 1 or qkv.shape[2] % (3 * heads) or not qkv.shape[2]:
        raise ValueError(f"attention: qkv is {tuple(qkv.shape)}; accepted: (N, L, 3 heads d), with heads={heads}")
    q, k, v = qkv.chunk(3, 2)
    return attended(q, k, v, heads)[0]


def attended(
    q: Tensor, k: Tensor, v: Tensor, heads: int, residual: Tensor | None = None, *, measure: bool = False
) -> tuple[Tensor, Tensor]:
    """`attention` without its checks, residual (N, L, C) added: the result, and where measure its moments (N, C, 2).

    q (N, L, C); k, v (N, M, C), of the same tokens or of M >= 1 others, as those of a text.
    """
    y, moments = library.call("attention", q, k, v, heads, residual, measure=measure)
    return y, moments


library.describe(
    "attention",
    "(Tensor q, Tensor k, Tensor v, int heads, Tensor? residual, bool measure) -> (Tensor, Tensor)",
    _fake,
    setup=_setup,
    backward=_backward,
)
dispatch.register("attention", "reference", attention_ref)
library.kernel("attention", "cpp")
