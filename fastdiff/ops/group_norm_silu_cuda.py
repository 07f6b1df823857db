"""GroupNorm, injection and SiLU on a GPU: `fastdiff.ops.group_norm_silu` by csrc/cuda/group_norm*.cu."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdiff.ops import cuda, group_norm_call, native
from fastdiff.ops.group_norm_call import Given

_ORDER = ("dy", "residual", "y", "dx", "dx2", "stats", "sums")


def launch(given: Given, groups: int, *, eps: float = 0.0, act: bool, backward: bool, **others: Tensor | None) -> None:
    """Run the norm (groups 0: the injection alone); others: dy, the residual, what it writes, the statistics."""
    n, channels, pixels = given.sizes
    residual = others.get("residual")
    tensors = (given.x, given.x2, *map(others.get, _ORDER))
    call = cuda.kernels.GroupNorm(
        tuple(map(native.address, tensors)),
        tuple((native.address(v), native.apart(v)) for v in given.small),
        *(native.DTYPES[given.x.dtype], native.DTYPES[(given.x if residual is None else residual).dtype]),
        *(given.last, act),
        *(n, given.x.shape[1], channels, pixels, groups, eps),
    )
    index, stream = cuda.queue(given.x)
    planned = cuda.kernels.Planned(call, cuda.device(index), backward)
    workspace = given.x.new_empty(planned.workspace, dtype=torch.float32)
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
    given = Given.of(x, x2, weight, bias, add, scale, shift)
    y = given.empty(given.sizes[1])
    stats = x.new_empty((x.shape[0], groups, 3), dtype=torch.float32)
    if y.numel() == 0:
        return y, stats.zero_()
    launch(given, groups, eps=eps, act=act, backward=False, y=y, stats=stats)
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
    given = Given.of(x, x2, weight, bias, add, scale, shift)
    dx, dx2 = given.empty(x.shape[1]), None if x2 is None else given.empty(x2.shape[1])
    results = dx, x.new_empty(0) if dx2 is None else dx2, x.new_empty((*dy.shape[:2], 3), dtype=torch.float32)
    if dy.numel() == 0:
        results[2].zero_()
        return results
    dy, stats = given.like(dy), native.dense(stats, torch.float32)
    launch(given, groups, act=act, backward=True, dy=dy, stats=stats, dx=dx, dx2=dx2, sums=results[2])
    return results


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
    return group_norm_call.refuses("CUDA", x, x2) or cuda.refuses(x, *numbers, x2, add, scale, shift)
