"""Attention of all pixels to all pixels, between its two projections.

    y = softmax(q k^T / sqrt(d)) v,   [q, k, v] = qkv

Every head by itself. On CPUs it is C++: some queries at a time see all keys, and all is read as the projection left it.

Source: Vaswani 2017, equation 1.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastdiff.ops import dispatch, library


def attention_ref(qkv: Tensor, heads: int) -> Tensor:
    """The formula above in plain PyTorch."""
    n, tokens, channels = qkv.shape
    q, k, v = qkv.reshape(n, tokens, 3, heads, channels // (3 * heads)).permute(2, 0, 3, 1, 4)  # (N, heads, L, d) each
    # torch's fused one has no second derivative on CPUs, and none in forward mode
    y: Tensor = (q @ k.mT / q.shape[3] ** 0.5).softmax(3) @ v
    return y.transpose(1, 2).flatten(2)


def _fake(qkv: Tensor, heads: int) -> Tensor:
    return qkv.new_empty((*qkv.shape[:2], qkv.shape[2] // 3))


def _setup(ctx: Any, inputs: tuple[Tensor, int], output: Tensor) -> None:
    qkv, ctx.heads = inputs
    ctx.save_for_backward(qkv)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, None]:
    """By the formula in torch ops, which can be differentiated again."""
    (grad,) = library.grads_of(lambda qkv: attention_ref(qkv, ctx.heads), ctx.saved_tensors, dy)
    return grad, None


def attention(qkv: Tensor, heads: int = 1) -> Tensor:
    """softmax(q k^T / sqrt(d)) v by heads, see the head of this file.

    qkv (N, L, 3 C): q's channels, then k's, then v's, each ordered by head. Returns (N, L, C). Twice differentiable.
    Raises ValueError where 3 heads do not divide the channels, or there are none. Vaswani 2017.
    """
    if qkv.ndim != 3 or heads < 1 or qkv.shape[2] % (3 * heads) or not qkv.shape[2]:
        raise ValueError(f"attention: qkv is {tuple(qkv.shape)}; accepted: (N, L, 3 heads d), with heads={heads}")
    y: Tensor = library.call("attention", qkv, heads)
    return y


library.describe("attention", "(Tensor qkv, int heads) -> Tensor", _fake, setup=_setup, backward=_backward)
dispatch.register("attention", "reference", attention_ref)
library.kernel("attention", "cpp")
