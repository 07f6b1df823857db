"""The injection of the time embedding on CPUs: `fastdiff.ops.inject` by csrc/cpu/inject.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdiff.ops import group_norm_call, native
from fastdiff.ops.group_norm_call import Given
from fastdiff.ops.group_norm_silu_cpp import normed


def run(
    x: Tensor,
    *,
    add: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    act: bool = False,
) -> Tensor:
    """`inject` by csrc/cpu/inject.cpp."""
    given = Given.of(x, None, None, None, add, scale, shift)
    residual = given.beside(residual)
    y = native.fresh_like(x, given.form)
    dtype = native.DTYPES[x.dtype if residual is None else residual.dtype]
    native.cpu.inject(normed(given, 1, act), native.address(residual), dtype, y.data_ptr())
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
    given = Given.of(x, None, None, None, add, scale, shift)
    dy, dx = given.like(dy), native.fresh_like(x, given.form)
    sums = x.new_empty((*x.shape[:2], 2), dtype=torch.float32)
    native.cpu.inject_backward(normed(given, 1, act), dy.data_ptr(), dx.data_ptr(), sums.data_ptr())
    return dx, sums


def refuses(
    x: Tensor,
    *,
    add: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    **_: object,
) -> str | None:
    """Why the kernel does not take these arguments, None when it does."""
    return group_norm_call.refuses("cpp", x) or native.refuses(x, add, scale, shift, residual)
