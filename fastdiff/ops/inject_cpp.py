"""The injection of the time embedding on CPUs: `fastdiff.ops.inject` by csrc/cpu/inject.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdiff.ops import native
from fastdiff.ops.group_norm_silu_cpp import prepare


def run(
    x: Tensor,
    *,
    add: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    act: bool = False,
) -> Tensor:
    """`inject` by csrc/cpu/inject.cpp."""
    call = prepare(x, 1, act, add=add, scale=scale, shift=shift)
    y = native.fresh_like(x, call.form)
    native.cpu.inject(call.args, y.data_ptr())
    return y


def run_backward(
    dy: Tensor,
    x: Tensor,
    *,
    add: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    act: bool = False,
) -> tuple[Tensor, Tensor]:
    """The gradient of x, and the sums over the pixels (N, C, 2) of dn and dn (x + add), n the SiLU's argument."""
    call = prepare(x, 1, act, add=add, scale=scale, shift=shift)
    dy = dy.to(x.dtype).contiguous(memory_format=call.form)
    dx = native.fresh_like(x, call.form)
    sums = torch.empty((*x.shape[:2], 2), dtype=torch.float32)
    native.cpu.inject_backward(call.args, dy.data_ptr(), dx.data_ptr(), sums.data_ptr())
    return dx, sums


def refuses(
    x: Tensor, *, add: Tensor | None = None, scale: Tensor | None = None, shift: Tensor | None = None, **_: object
) -> str | None:
    """Why the kernel does not take these arguments, None when it does."""
    if x.dtype not in native.FLOATS:
        return f"the cpp kernel takes float32, bfloat16 and float16, got {x.dtype}"
    return native.refuses(x, add, scale, shift)
