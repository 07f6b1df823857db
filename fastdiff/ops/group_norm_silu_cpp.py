"""GroupNorm and SiLU on CPUs: `fastdiff.ops.group_norm_silu` by csrc/cpu/group_norm.cpp, either layout."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdiff.ops import native
from fastdiff.ops.group_norm_silu import layout


class Prepared(NamedTuple):
    """A call as the kernels take it."""

    args: tuple[Any, ...]
    """What bind_cpu.cpp makes a Normed of."""
    shape: tuple[int, ...]
    """Of the result, all channels of x and x2."""
    form: torch.memory_format
    held: tuple[Tensor | None, ...]
    """The tensors whose addresses are in args."""


def prepare(
    x: Tensor,
    groups: int,
    act: bool,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    x2: Tensor | None = None,
    add: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
) -> Prepared:
    """Addresses and sizes of a call; copies only what is not dense, or small and not fp32."""
    form = layout(x)
    n, first, *space = x.shape
    x = x.contiguous(memory_format=form)
    channels = first
    if x2 is not None:
        x2 = x2.contiguous(memory_format=form)
        channels += x2.shape[1]
    held = [x, x2]
    numbers: list[int] = []
    for v in (weight, bias, add, scale, shift):
        if v is None:
            numbers += (0, 0)
            continue
        v = native.dense(v, torch.float32)  # noqa: PLW2901
        held.append(v)
        numbers += (v.data_ptr(), channels if v.ndim == 2 else 0)
    args = (
        *(x.data_ptr(), native.address(x2), first, native.DTYPES[x.dtype], form is not torch.contiguous_format),
        *(n, channels, math.prod(space), groups, *numbers, act, torch.get_num_threads()),
    )
    return Prepared(args, (n, channels, *space), form, tuple(held))


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
    """y, and stats (N, groups, 3): mean, its remainder, 1 / std; by csrc/cpu/group_norm.cpp."""
    call = prepare(x, groups, act, weight, bias, x2, add, scale, shift)
    y = native.fresh_like(x, call.form) if x2 is None else native.fresh(call.shape, x.dtype, call.form)
    stats = torch.empty(call.shape[0], groups, 3, dtype=torch.float32)
    native.cpu.group_norm(call.args, eps, y.data_ptr(), stats.data_ptr())
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
    """Gradients of x and x2, and the sums over the pixels (N, C, 3) of dn, dn xhat and dz, by group_norm_backward.cpp.

    n is the argument of the SiLU, xhat = (z - mean) / std, z = cat([x, x2], 1) + add; without x2 its gradient is empty.
    """
    call = prepare(x, groups, act, weight, bias, x2, add, scale, shift)
    dy = dy.to(x.dtype).contiguous(memory_format=call.form)
    dx = native.fresh_like(x, call.form)
    dx2 = x.new_empty(0) if x2 is None else native.fresh_like(x2, call.form)
    sums = torch.empty((*call.shape[:2], 3), dtype=torch.float32)
    native.cpu.group_norm_backward(call.args, *(v.data_ptr() for v in (stats.contiguous(), dy, dx, dx2, sums)))
    return dx, dx2, sums


def refuses(
    x: Tensor,
    groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    x2: Tensor | None = None,
    add: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    **_: object,
) -> str | None:
    """Why the kernel does not take these arguments, None when it does."""
    if x.dtype not in native.FLOATS:
        return f"the cpp kernel takes float32, bfloat16 and float16, got {x.dtype}"
    if x2 is not None and x2.dtype != x.dtype:
        return f"the cpp kernel takes x and x2 of one dtype, got {x.dtype} and {x2.dtype}"
    return native.refuses(x, weight, bias, x2, add, scale, shift)
