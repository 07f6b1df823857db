"""The injection on a GPU: `fastdiff.ops.inject` by csrc/cuda/group_norm*.cu, whose apply pass it is."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdiff.ops import cuda, group_norm_silu_cuda, native
from fastdiff.ops.group_norm_silu import layout


def run(
    x: Tensor,
    *,
    add: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    act: bool = False,
) -> Tensor:
    """y in x's dtype and layout."""
    form = layout(x)
    x = x.contiguous(memory_format=form)
    y = torch.empty_like(x, memory_format=form)
    if y.numel():
        tensors: dict[str, Tensor | None] = {"x": x, "x2": None, "y": y}
        group_norm_silu_cuda.launch(tensors, [None, None, add, scale, shift], 0, act=act, backward=False)
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
    form = layout(x)
    x, dy = x.contiguous(memory_format=form), dy.to(x.dtype).contiguous(memory_format=form)
    dx, sums = torch.empty_like(x, memory_format=form), x.new_empty((*x.shape[:2], 2), dtype=torch.float32)
    if dx.numel() == 0:
        return dx, sums.zero_()
    tensors: dict[str, Tensor | None] = {"x": x, "x2": None, "dy": dy, "dx": dx, "sums": sums}
    group_norm_silu_cuda.launch(tensors, [None, None, add, scale, shift], 0, act=act, backward=True)
    return dx, sums


def refuses(
    x: Tensor,
    *,
    add: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    **_: object,
) -> str | None:
    """Why the kernel does not take these arguments, None when it does."""
    if x.dtype not in native.FLOATS:
        return f"the CUDA kernel takes float32, bfloat16 and float16, got {x.dtype}"
    for v in (add, scale, shift):
        if v is not None and v.dtype == torch.float64:
            return "the CUDA kernel computes in float32, got a float64 parameter"
    return cuda.refuses(x, add, scale, shift)
