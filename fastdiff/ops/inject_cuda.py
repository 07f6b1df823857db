"""The injection on a GPU: `fastdiff.ops.inject` by csrc/cuda/group_norm*.cu, whose apply pass it is."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdiff.ops import cuda, group_norm_call, group_norm_silu_cuda
from fastdiff.ops.group_norm_call import Given


def run(
    x: Tensor,
    *,
    add: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    act: bool = False,
) -> Tensor:
    """y in x's dtype and layout."""
    given = Given.of(x, None, None, None, add, scale, shift)
    y = given.empty(x.shape[1])
    if y.numel():
        group_norm_silu_cuda.launch(given, 0, act=act, backward=False, residual=given.beside(residual), y=y)
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
    """(dx, sums): sums (N, C, 2) fp32 over the pixels, of dn and dn (x + add)."""
    given = Given.of(x, None, None, None, add, scale, shift)
    dx, sums = given.empty(x.shape[1]), x.new_empty((*x.shape[:2], 2), dtype=torch.float32)
    if dx.numel() == 0:
        return dx, sums.zero_()
    dy = given.like(dy)
    group_norm_silu_cuda.launch(given, 0, act=act, backward=True, dy=dy, dx=dx, sums=sums)
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
    return group_norm_call.refuses("CUDA", x) or cuda.refuses(x, add, scale, shift, residual)
