"""Attention on CPUs: `fastdiff.ops.attention` by csrc/cpu/attention.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdiff.ops import native
from fastdiff.ops.tape import empty, recording


def run(
    q: Tensor, k: Tensor, v: Tensor, heads: int, residual: Tensor | None = None, *, measure: bool = False
) -> tuple[Tensor, Tensor]:
    """The result, and its moments (N, C, 2) where asked for, by csrc/cpu/attention.cpp."""
    n, tokens, channels = q.shape
    apart, keys_apart = native.tokens_apart(q), native.tokens_apart(k, v)
    if apart is None:
        q, apart = q.contiguous(), channels
    if keys_apart is None:
        k, v = torch.cat([k, v], 2).chunk(2, 2)
        keys_apart = 2 * channels
    residual = None if residual is None else residual.contiguous()
    y = empty((n, tokens, channels), torch.float32)
    out = empty((n, channels, 2) if measure else (0,), torch.float64)
    call = (
        *(q.data_ptr(), k.data_ptr(), v.data_ptr(), apart, keys_apart),
        *(n, tokens, k.shape[1], heads, channels // heads),
        *(y.data_ptr(), native.address(residual), out.data_ptr() if measure else 0),
    )
    if (tape := recording()) is not None:
        tape.attention(call, q, k, v, residual)
    native.cpu.attention(call, torch.get_num_threads())
    return y, out


def refuses(q: Tensor, k: Tensor, v: Tensor, heads: int, residual: Tensor | None = None, **given: object) -> str | None:
    """Why the kernel does not take these arguments, None when it does."""
    for x in (q, k, v, residual):
        if x is not None and x.dtype is not torch.float32:
            return f"the cpp kernel takes float32, got {x.dtype}"
    if q.shape[1] and not k.shape[1]:
        return "the cpp kernel takes at least one key, got none"
    return native.refuses(q, k, v, residual)
