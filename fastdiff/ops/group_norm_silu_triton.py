"""group_norm_silu in Triton: one pass for slabs that fit a block's registers, else partial sums, statistics, apply."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdiff.ops import group_norm_tiles as tiles, jit, native
from fastdiff.ops.group_norm_backward_triton import run_backward
from fastdiff.ops.group_norm_call import Given
from fastdiff.ops.group_norm_parts_triton import (
    along,
    coefficients,
    group_sum,
    load,
    numbers,
    sigmoid,
    statistics,
    store,
    total,
    two_sum,
    used,
    whereabouts,
)
from fastdiff.ops.group_norm_tiles import Tiles

__all__ = ["refuses", "run", "run_backward"]


@triton.jit
def one_pass_kernel(
    x, x2, y, stats, weight, bias, add, scale, shift, add_n, scale_n, shift_n, C, C1, P, eps,
    GROUP: tl.constexpr, SLAB: tl.constexpr, GROUPS: tl.constexpr, WHOLE: tl.constexpr, ACT: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, LAST: tl.constexpr, VECTOR: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """A block: whole groups of one image. Two passes over registers give the statistics."""
    slabs = tl.cdiv(C, SLAB)
    n, c0 = tl.program_id(0) // slabs, tl.program_id(0) % slabs * SLAB
    channels = SLAB if WHOLE else tl.minimum(SLAB, C - c0)
    c = c0 + tl.arange(0, BLOCK_C)
    valid = tl.arange(0, BLOCK_C) < channels
    inside = used(channels, P, BLOCK_C, BLOCK_P, LAST, FULL)
    v = load(x, x2, n, c0, 0, C, C1, P, inside, BLOCK_C, BLOCK_P, LAST, VECTOR)

    # per channel: the mean as it came out, and the sums of what is left; then per group, relative to the channels' mean
    # as it is rounded here: fused into the difference below, it would not be the pivot that hi and lo are made of
    pivot = tl.fma(total(v, LAST), tl.full((BLOCK_C,), 1.0 / P, tl.float32), 0.0)
    d = tl.where(inside, v - along(pivot, LAST), 0.0)
    s1, s2 = total(d, LAST), total(d * d, LAST)
    added = numbers(add, n, add_n, c, valid, 0.0, BLOCK_C)
    hi, lo = two_sum(pivot, added)
    near = group_sum(tl.where(valid, hi, 0.0), GROUP, GROUPS, BLOCK_C) * (1.0 / GROUP)
    delta = (hi - near) + lo
    share = 1.0 / (GROUP * tl.cast(P, tl.float32))
    m = group_sum(tl.where(valid, P * delta + s1, 0.0), GROUP, GROUPS, BLOCK_C) * share
    delta -= m
    var = group_sum(tl.where(valid, s2 + delta * (2 * s1 + P * delta), 0.0), GROUP, GROUPS, BLOCK_C) * share
    rstd = deviation(var, eps)
    hi, lo = two_sum(near, m)
    keep(stats, n, c, valid & (c % GROUP == 0), C, hi, lo, rstd, GROUP)

    A, M, B, _ = coefficients(
        hi, lo, rstd, added,
        numbers(weight, 0, 0, c, valid, 1.0, BLOCK_C), numbers(bias, 0, 0, c, valid, 0.0, BLOCK_C),
        1.0 + numbers(scale, n, scale_n, c, valid, 0.0, BLOCK_C), numbers(shift, n, shift_n, c, valid, 0.0, BLOCK_C),
    )  # fmt: skip
    v = along(A, LAST) * (v - along(M, LAST)) + along(B, LAST)
    if ACT:
        v *= sigmoid(v)
    store(v, y, None, n, c0, 0, C, C, P, inside, BLOCK_C, BLOCK_P, LAST, VECTOR)


@triton.jit
def deviation(var, eps):
    """1 / sqrt(var + eps); a NaN stays one."""
    return tl.rsqrt(tl.maximum(var, 0.0, propagate_nan=tl.PropagateNan.ALL) + eps)


@triton.jit
def keep(stats, n, c, valid, C, hi, lo, rstd, GROUP: tl.constexpr):
    """Write the statistics of the groups of channels c."""
    at = stats + 3 * (tl.cast(n, tl.int64) * (C // GROUP) + c // GROUP)
    tl.store(at, hi, mask=valid)
    tl.store(at + 1, lo, mask=valid)
    tl.store(at + 2, rstd, mask=valid)


@triton.jit
def sums_kernel(
    x, x2, part, C, C1, P, plane, steps, splits,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, LAST: tl.constexpr, VECTOR: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """part (3, N, C, splits): a pivot, and the sums of x - pivot and of its square.

    The pivot is the mean of the block's first tile: the variance loses no digits to a large mean, nor to an outlier.
    """
    n, c0, split, p0, tiles = whereabouts(C, P, steps, splits, BLOCK_C, BLOCK_P, LAST, False)
    inside = used(C - c0, P - p0, BLOCK_C, BLOCK_P, LAST, FULL)
    v = load(x, x2, n, c0, p0, C, C1, P, inside, BLOCK_C, BLOCK_P, LAST, VECTOR)
    pivot = total(v, LAST) / tl.minimum(P - p0, BLOCK_P)
    s1 = tl.where(inside, v - along(pivot, LAST), 0.0)
    s2 = s1 * s1
    for k in range(1, tiles):
        p = p0 + k * BLOCK_P
        inside = used(C - c0, P - p, BLOCK_C, BLOCK_P, LAST, FULL)
        v = load(x, x2, n, c0, p, C, C1, P, inside, BLOCK_C, BLOCK_P, LAST, VECTOR)
        d = tl.where(inside, v - along(pivot, LAST), 0.0)
        s1 += d
        s2 += d * d
    c = c0 + tl.arange(0, BLOCK_C)
    at = part + (tl.cast(n, tl.int64) * C + c) * splits + split
    tl.store(at, pivot, mask=c < C)
    tl.store(at + plane, total(s1, LAST), mask=c < C)
    tl.store(at + 2 * plane, total(s2, LAST), mask=c < C)


@triton.jit
def statistics_kernel(
    part, add, stats, add_n, C, P, plane, span, splits, eps, GROUP: tl.constexpr, BLOCK: tl.constexpr
):
    """mean, remainder and rstd of one group from its GROUP x splits partial sums; a split is of `span` pixels."""
    groups = C // GROUP
    n, c0 = tl.program_id(0) // groups, tl.program_id(0) % groups * GROUP
    part += (tl.cast(n, tl.int64) * C + c0) * splits
    i = tl.arange(0, BLOCK)
    near = tl.load(part)
    if add is not None:
        near += tl.load(add + tl.cast(n, tl.int64) * add_n + c0)
    size = GROUP * tl.cast(P, tl.float32)
    sums = tl.full((BLOCK,), 0.0, tl.float32)
    for i0 in range(0, GROUP * splits, BLOCK):
        delta, count, s1, s2 = entries(part, add, n, add_n, c0, i0 + i, P, plane, span, splits, near, GROUP)
        sums += count * delta + s1
    m = tl.sum(sums, 0) / size
    squares = tl.full((BLOCK,), 0.0, tl.float32)
    for i0 in range(0, GROUP * splits, BLOCK):
        delta, count, s1, s2 = entries(part, add, n, add_n, c0, i0 + i, P, plane, span, splits, near, GROUP)
        delta -= m
        squares += s2 + delta * (2 * s1 + count * delta)
    rstd = deviation(tl.sum(squares, 0) / size, eps)
    hi, lo = two_sum(near, m)
    keep(stats, n, c0, True, C, hi, lo, rstd, GROUP)


@triton.jit
def entries(part, add, n, add_n, c0, i, P, plane, span, splits, near, GROUP: tl.constexpr):
    """Pivot + add - near, number of pixels and both sums of entries i = channel x splits + split; 0 past the end."""
    valid = i < GROUP * splits
    hi = tl.load(part + i, mask=valid, other=0.0)
    added = 0.0
    if add is not None:
        added = tl.load(add + tl.cast(n, tl.int64) * add_n + c0 + i // splits, mask=valid, other=0.0)
    hi, lo = two_sum(hi, added)
    count = tl.where(valid, tl.minimum(span, P - i % splits * span), 0).to(tl.float32)
    s1 = tl.load(part + plane + i, mask=valid, other=0.0)
    return (hi - near) + lo, count, s1, tl.load(part + 2 * plane + i, mask=valid, other=0.0)


@triton.jit
def apply_kernel(
    x, x2, residual, y, stats, weight, bias, add, scale, shift, add_n, scale_n, shift_n, C, C1, P, steps, splits,
    GROUP: tl.constexpr, ACT: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, LAST: tl.constexpr, VECTOR: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """y = act(A (x - M) + B); without stats that is inject's (x + add) (1 + scale) + shift, and residual behind it."""
    n, c0, _, p0, tiles = whereabouts(C, P, steps, splits, BLOCK_C, BLOCK_P, LAST, True)
    c = c0 + tl.arange(0, BLOCK_C)
    added = numbers(add, n, add_n, c, c < C, 0.0, BLOCK_C)
    A = 1.0 + numbers(scale, n, scale_n, c, c < C, 0.0, BLOCK_C)
    B = numbers(shift, n, shift_n, c, c < C, 0.0, BLOCK_C)
    M = -added
    if stats is not None:
        hi, lo, rstd = statistics(stats, n, c, c < C, C, GROUP)
        w, b = numbers(weight, 0, 0, c, c < C, 1.0, BLOCK_C), numbers(bias, 0, 0, c, c < C, 0.0, BLOCK_C)
        A, M, B, _ = coefficients(hi, lo, rstd, added, w, b, A, B)
    for k in range(tiles):
        p = p0 + k * BLOCK_P
        inside = used(C - c0, P - p, BLOCK_C, BLOCK_P, LAST, FULL)
        v = load(x, x2, n, c0, p, C, C1, P, inside, BLOCK_C, BLOCK_P, LAST, VECTOR)
        v = along(A, LAST) * (v - along(M, LAST)) + along(B, LAST)
        if ACT:
            v *= sigmoid(v)
        if residual is not None:
            v += load(residual, None, n, c0, p, C, C, P, inside, BLOCK_C, BLOCK_P, LAST, VECTOR)
        store(v, y, None, n, c0, p, C, C, P, inside, BLOCK_C, BLOCK_P, LAST, VECTOR)


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
    """(y, stats): stats (N, groups, 3) are mean, its fp32 remainder, and rstd of cat([x, x2], 1) + add."""
    given = Given.of(x, x2, weight, bias, add, scale, shift)
    plan = tiles.choose(*given.sizes, groups, given.last, x.element_size(), tiles.multiprocessors(x.device))
    return forward(given, groups, eps, act, plan)


def forward(given: Given, groups: int, eps: float, act: bool, plan: Tiles) -> tuple[Tensor, Tensor]:
    """`run` with tiles of the caller's choice."""
    x, (n, channels, pixels) = given.x, given.sizes
    y = given.empty(channels)
    stats = torch.empty((n, groups, 3), dtype=torch.float32, device=x.device)
    if y.numel() == 0:
        return y, stats.zero_()
    numbers, sizes = tiles.numbers(given), (channels, int(x.shape[1]), pixels)
    block, group = tiles.block(given, plan), channels // groups
    if plan.one_pass:
        grid = (n * tiles.blocks(channels, plan.slab),)
        whole = tiles.whole_slabs(given, plan, group)
        jit.launch(one_pass_kernel, grid)(x, given.x2, y, stats, *numbers, *sizes, eps, ACT=act, **block, **whole)
        return y, stats
    part = torch.empty((3, n, channels, plan.splits), dtype=torch.float32, device=x.device)
    grid = (n * tiles.blocks(channels, plan.block_c) * plan.splits,)
    walk, plane = (plan.steps, plan.splits), n * channels * plan.splits
    jit.launch(sums_kernel, grid)(x, given.x2, part, *sizes, plane, *walk, **block)
    jit.launch(statistics_kernel, (n * groups,))(
        part, given.add, stats, native.apart(given.add), channels, pixels, plane,
        plan.steps * plan.block_p, plan.splits, eps,
        GROUP=group, BLOCK=min(tiles.ENTRIES, tiles.power(group * plan.splits)),
    )  # fmt: skip
    jit.launch(apply_kernel, grid)(x, given.x2, None, y, stats, *numbers, *sizes, *walk, GROUP=group, ACT=act, **block)
    return y, stats


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
    """Why the kernels do not take these arguments, None when they do."""
    return tiles.refuses(x, x2) or jit.refuses(x, weight, bias, x2, add, scale, shift)
