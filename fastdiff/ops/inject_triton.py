"""inject in Triton: the apply pass of group_norm_silu without statistics, and with the residual."""

import torch
from torch import Tensor

from fastdiff.ops import group_norm_tiles as tiles, jit
from fastdiff.ops.group_norm_backward_triton import sums_kernel
from fastdiff.ops.group_norm_call import Given
from fastdiff.ops.group_norm_silu_triton import apply_kernel


def run(
    x: Tensor,
    *,
    add: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    act: bool = False,
) -> Tensor:
    """act((x + add) (1 + scale) + shift) + residual in one pass."""
    given = Given.of(x, None, None, None, add, scale, shift)
    residual = given.beside(residual)
    n, channels, pixels = given.sizes
    y = given.empty(channels)
    if y.numel():
        plan = tiles.split(n, channels, pixels, given.last, tiles.multiprocessors(x.device))
        grid = (n * tiles.blocks(channels, plan.block_c) * plan.splits,)
        jit.launch(apply_kernel, grid)(
            given.x, None, residual, y, None, *tiles.numbers(given), channels, channels, pixels,
            plan.steps, plan.splits, GROUP=1, ACT=act, **tiles.block(given, plan),
        )  # fmt: skip
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
    """(dx, sums): sums (N, C, 2) = sum_p dn, sum_p dn (x + add)."""
    given = Given.of(x, None, None, None, add, scale, shift)
    n, channels, pixels = given.sizes
    dx = given.empty(channels)
    if dx.numel() == 0:
        return dx, torch.zeros((n, channels, 2), dtype=torch.float32, device=x.device)
    plan = tiles.split(n, channels, pixels, given.last, tiles.multiprocessors(x.device))
    part = torch.empty((2, n, channels, plan.splits), dtype=torch.float32, device=x.device)
    grid = (n * tiles.blocks(channels, plan.block_c) * plan.splits,)
    jit.launch(sums_kernel, grid)(
        given.like(dy), given.x, None, dx, part, None, *tiles.numbers(given),
        channels, channels, pixels, n * channels * plan.splits, plan.steps, plan.splits, GROUP=1, ACT=act,
        **tiles.block(given, plan),
    )  # fmt: skip
    return dx, part.sum(-1).movedim(0, -1).contiguous()


def refuses(
    x: Tensor,
    *,
    add: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    **_: object,
) -> str | None:
    """Why the kernels do not take these arguments, None when they do."""
    return tiles.refuses(x) or jit.refuses(x, add, scale, shift, residual)
