"""GroupNorm and SiLU on CPUs: `fastdiff.ops.group_norm_silu` by csrc/cpu/group_norm.cpp, either layout."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastdiff.ops import group_norm_call, native
from fastdiff.ops.group_norm_call import Given


def normed(given: Given, groups: int, act: bool) -> tuple[Any, ...]:
    """What bind_cpu.cpp makes a Normed of."""
    x, (n, channels, pixels) = given.x, given.sizes
    return (
        *(x.data_ptr(), native.address(given.x2), x.shape[1], native.DTYPES[x.dtype], given.last),
        *(n, channels, pixels, groups),
        *(number for v in given.small for number in (native.address(v), native.apart(v))),
        *(act, torch.get_num_threads()),
    )


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
    given = Given.of(x, x2, weight, bias, add, scale, shift)
    joined = *given.sizes[:2], *x.shape[2:]
    y = native.fresh_like(x, given.form) if x2 is None else native.fresh(joined, x.dtype, given.form)
    stats = x.new_empty((len(x), groups, 3), dtype=torch.float32)
    native.cpu.group_norm(normed(given, groups, act), eps, y.data_ptr(), stats.data_ptr())
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
    given = Given.of(x, x2, weight, bias, add, scale, shift)
    dx = native.fresh_like(x, given.form)
    dx2 = x.new_empty(0) if x2 is None else native.fresh_like(x2, given.form)
    sums = x.new_empty((*given.sizes[:2], 3), dtype=torch.float32)
    tensors = (stats.contiguous(), given.like(dy), dx, dx2, sums)
    native.cpu.group_norm_backward(normed(given, groups, act), *(v.data_ptr() for v in tensors))
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
    return group_norm_call.refuses("cpp", x, x2) or native.refuses(x, weight, bias, x2, add, scale, shift)
