"""Attention on CPUs: `fastdiff.ops.attention` by csrc/cpu/attention.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdiff.ops import native
from fastdiff.ops.tape import empty, recording


def run(qkv: Tensor, heads: int) -> Tensor:
    """`attention` by csrc/cpu/attention.cpp."""
    qkv = qkv.contiguous()
    n, tokens, channels = qkv.shape
    y = empty((n, tokens, channels // 3), torch.float32)
    call = (qkv.data_ptr(), y.data_ptr(), n, tokens, heads, channels // 3 // heads)
    if (tape := recording()) is not None:
        tape.attention(call, qkv)
    native.cpu.attention(call, torch.get_num_threads())
    return y


def refuses(qkv: Tensor, heads: int) -> str | None:
    """Why the kernel does not take these arguments, None when it does."""
    if qkv.dtype is not torch.float32:
        return f"the cpp kernel takes float32, got {qkv.dtype}"
    return native.refuses(qkv)
