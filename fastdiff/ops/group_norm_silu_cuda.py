"""GroupNorm, injection and SiLU on a GPU: `fastdiff.ops.group_norm_silu` by csrc/cuda/group_norm*.cu."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastdiff.ops import cuda, native
from fastdiff.ops.group_norm_silu import layout


def launch(
    tensors: dict[str, Tensor | None],
    numbers: list[Tensor | None],
    groups: int,
    *,
    eps: float = 0.0,
    act: bool,
    backward: bool,
) -> None:
    """Run the norm (groups 0: the injection alone) on dense `tensors` of one layout; numbers: weight .. shift."""
    x, x2 = tensors["x"], tensors["x2"]
    assert x is not None
    n, first, *space = x.shape
    channels = first + (0 if x2 is None else x2.shape[1])
    small = [None if v is None else native.dense(v, torch.float32) for v in numbers]
    order = ("x", "x2", "dy", "y", "dx", "dx2", "stats", "sums")
    call = cuda.kernels.GroupNorm(
        tuple(native.address(tensors.get(name)) for name in order),
        tuple((native.address(v), 0 if v is None or v.ndim == 1 else channels) for v in small),
        *(native.DTYPES[x.dtype], layout(x) != torch.contiguous_format, act),
        *(n, first, channels, math.prod(space), groups, eps),
    )
    index, stream = cuda.queue(x)
    planned = cuda.kernels.Planned(call, cuda.device(index), backward)
    workspace = x.new_empty(planned.workspace, dtype=torch.float32)
    planned.run(workspace.data_ptr(), index, stream)


def run(
    x: Tensor,
    groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    eps: float = 1e-5,
    x2: Tensor | None = None,
    add: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    act: bool = True,
) -> tuple[Tensor, Tensor]:
    """(y, stats): stats (N, groups, 3) fp32 holds the mean of z as hi + lo, and rstd."""
    form = layout(x)
    x, x2 = x.contiguous(memory_format=form), None if x2 is None else x2.contiguous(memory_format=form)
    channels = x.shape[1] + (0 if x2 is None else x2.shape[1])
    y = torch.empty((x.shape[0], channels, *x.shape[2:]), dtype=x.dtype, device=x.device, memory_format=form)
    stats = x.new_empty((x.shape[0], groups, 3), dtype=torch.float32)
    if y.numel() == 0:
        return y, stats.zero_()
    tensors: dict[str, Tensor | None] = {"x": x, "x2": x2, "y": y, "stats": stats}
    launch(tensors, [weight, bias, add, scale, shift], groups, eps=eps, act=act, backward=False)
    return y, stats


def run_backward(
    dy: Tensor,
    x: Tensor,
    stats: Tensor,
    groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    x2: Tensor | None = None,
    add: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    act: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dx2, sums): sums (N, C, 3) fp32 over the pixels, of dn, dn xhat and dz; dx2 is empty without x2."""
    form = layout(x)
    x, dy = x.contiguous(memory_format=form), dy.to(x.dtype).contiguous(memory_format=form)
    x2 = None if x2 is None else x2.contiguous(memory_format=form)
    dx = torch.empty_like(x, memory_format=form)
    dx2 = x.new_empty(0) if x2 is None else torch.empty_like(x2, memory_format=form)
    sums = x.new_empty((*dy.shape[:2], 3), dtype=torch.float32)
    if dy.numel() == 0:
        return dx, dx2, sums.zero_()
    tensors: dict[str, Tensor | None] = {
        **{"x": x, "x2": x2, "dy": dy, "dx": dx, "dx2": dx2 if x2 is not None else None},
        **{"stats": native.dense(stats, torch.float32), "sums": sums},
    }
    launch(tensors, [weight, bias, add, scale, shift], groups, act=act, backward=True)
    return dx, dx2, sums


def refuses(
    x: Tensor,
    groups: int,
    *numbers: Tensor | None,
    x2: Tensor | None = None,
    add: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    **_: object,
) -> str | None:
    """Why the kernel does not take these arguments, None when it does."""
    if x.dtype not in native.FLOATS:
        return f"the CUDA kernel takes float32, bfloat16 and float16, got {x.dtype}"
    if x2 is not None and x2.dtype != x.dtype:
        return f"x and x2 must have one dtype, got {x.dtype} and {x2.dtype}"
    for v in (*numbers, add, scale, shift):
        if v is not None and v.dtype == torch.float64:
            return "the CUDA kernel computes in float32, got a float64 parameter"
    return cuda.refuses(x, *numbers, x2, add, scale, shift)
