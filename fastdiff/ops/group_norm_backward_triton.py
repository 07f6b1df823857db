"""The backward of group_norm_silu in Triton.

With n = A (x - M) + B, u = x - M, xhat = rstd u + e and dn = dy silu'(n), the kernels sum per channel

    s1 = sum_p dn,  q = sum_p dn u,  t = sum_p u;        s2 = sum_p dn xhat = rstd q + e s1

and with w' = weight (1 + scale) and a_i = mean over the group's elements of w' s_i,

    dz = rstd (w' dn - a1 - xhat a2) = A dn - D u - E,   D = rstd^2 a2,  E = rstd (a1 + e a2)
    s3 = sum_p dz = A s1 - D t - E P
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdiff.ops import group_norm_tiles as tiles, jit
from fastdiff.ops.group_norm_call import Given
from fastdiff.ops.group_norm_parts_triton import (
    along,
    coefficients,
    group_sum,
    load,
    numbers,
    silu_slope,
    statistics,
    store,
    total,
    used,
    whereabouts,
)
from fastdiff.ops.group_norm_tiles import Tiles


@triton.jit
def folded(
    n, c, valid, C, stats, weight, bias, add, scale, shift, add_n, scale_n, shift_n,
    GROUP: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """A, M, B, e and rstd of channels c; without stats those of inject, whose x + add is u and xhat."""
    added = numbers(add, n, add_n, c, valid, 0.0, BLOCK_C)
    gain = 1.0 + numbers(scale, n, scale_n, c, valid, 0.0, BLOCK_C)
    shifted = numbers(shift, n, shift_n, c, valid, 0.0, BLOCK_C)
    if stats is None:
        return gain, -added, shifted, tl.zeros_like(gain), tl.zeros_like(gain) + 1.0
    else:
        hi, lo, rstd = statistics(stats, n, c, valid, C, GROUP)
        w, b = numbers(weight, 0, 0, c, valid, 1.0, BLOCK_C), numbers(bias, 0, 0, c, valid, 0.0, BLOCK_C)
        A, M, B, e = coefficients(hi, lo, rstd, added, w, b, gain, shifted)
        return A, M, B, e, rstd


@triton.jit
def differences(v, dy, A, M, B, inside, ACT: tl.constexpr, LAST: tl.constexpr):
    """dn and u of a tile; 0 outside."""
    u = tl.where(inside, v - along(M, LAST), 0.0)
    if ACT:
        dy *= silu_slope(along(A, LAST) * u + along(B, LAST))
    return dy, u


@triton.jit
def gradient(dn, u, A, D, E, LAST: tl.constexpr):
    """dz of a tile."""
    return along(A, LAST) * dn - along(D, LAST) * u - along(E, LAST)


@triton.jit
def one_pass_kernel(
    dy, x, x2, dx, dx2, sums, stats, weight, bias, add, scale, shift, add_n, scale_n, shift_n, C, C1, P,
    GROUP: tl.constexpr, SLAB: tl.constexpr, GROUPS: tl.constexpr, WHOLE: tl.constexpr, ACT: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, LAST: tl.constexpr, VECTOR: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """A block: whole groups of one image, whose x and dy stay in registers."""
    slabs = tl.cdiv(C, SLAB)
    n, c0 = tl.program_id(0) // slabs, tl.program_id(0) % slabs * SLAB
    channels = SLAB if WHOLE else tl.minimum(SLAB, C - c0)
    c = c0 + tl.arange(0, BLOCK_C)
    valid = tl.arange(0, BLOCK_C) < channels
    inside = used(channels, P, BLOCK_C, BLOCK_P, LAST, FULL)
    v = load(x, x2, n, c0, 0, C, C1, P, inside, BLOCK_C, BLOCK_P, LAST, VECTOR)
    dn = load(dy, None, n, c0, 0, C, C, P, inside, BLOCK_C, BLOCK_P, LAST, VECTOR)
    A, M, B, e, rstd = folded(
        n, c, valid, C, stats, weight, bias, add, scale, shift, add_n, scale_n, shift_n, GROUP, BLOCK_C
    )
    dn, u = differences(v, dn, A, M, B, inside, ACT, LAST)
    s1, q, t = total(dn, LAST), total(dn * u, LAST), total(u, LAST)
    s2 = rstd * q + e * s1
    share = 1.0 / (GROUP * tl.cast(P, tl.float32))
    # A = rstd w': these are a1 rstd and a2 rstd
    a1 = group_sum(tl.where(valid, A * s1, 0.0), GROUP, GROUPS, BLOCK_C) * share
    a2 = group_sum(tl.where(valid, A * s2, 0.0), GROUP, GROUPS, BLOCK_C) * share
    D, E = rstd * a2, a1 + e * a2
    keep_sums(sums, n, C, c, valid, s1, s2, A * s1 - D * t - E * P)
    store(gradient(dn, u, A, D, E, LAST), dx, dx2, n, c0, 0, C, C1, P, inside, BLOCK_C, BLOCK_P, LAST, VECTOR)


@triton.jit
def keep_sums(sums, n, C, c, valid, s1, s2, s3):
    """Write the three sums of channels c."""
    at = sums + 3 * (tl.cast(n, tl.int64) * C + c)
    tl.store(at, s1, mask=valid)
    tl.store(at + 1, s2, mask=valid)
    tl.store(at + 2, s3, mask=valid)


@triton.jit
def sums_kernel(
    dy, x, x2, dx, part, stats, weight, bias, add, scale, shift, add_n, scale_n, shift_n,
    C, C1, P, plane, steps, splits, GROUP: tl.constexpr, ACT: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, LAST: tl.constexpr, VECTOR: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """part (planes, N, C, splits): s1, q and t of a block's pixels. For inject, which needs no t, dx = A dn as well."""
    n, c0, split, p0, tiles = whereabouts(C, P, steps, splits, BLOCK_C, BLOCK_P, LAST, False)
    c = c0 + tl.arange(0, BLOCK_C)
    A, M, B, _, _ = folded(
        n, c, c < C, C, stats, weight, bias, add, scale, shift, add_n, scale_n, shift_n, GROUP, BLOCK_C
    )
    s1 = tl.zeros((BLOCK_P, BLOCK_C) if LAST else (BLOCK_C, BLOCK_P), tl.float32)
    q, t = tl.zeros_like(s1), tl.zeros_like(s1)
    for k in range(tiles):
        p = p0 + k * BLOCK_P
        inside = used(C - c0, P - p, BLOCK_C, BLOCK_P, LAST, FULL)
        v = load(x, x2, n, c0, p, C, C1, P, inside, BLOCK_C, BLOCK_P, LAST, VECTOR)
        dn = load(dy, None, n, c0, p, C, C, P, inside, BLOCK_C, BLOCK_P, LAST, VECTOR)
        dn, u = differences(v, dn, A, M, B, inside, ACT, LAST)
        s1 += dn
        q += dn * u
        if dx is None:
            t += u
        else:
            store(along(A, LAST) * dn, dx, None, n, c0, p, C, C, P, inside, BLOCK_C, BLOCK_P, LAST, VECTOR)
    at = part + (tl.cast(n, tl.int64) * C + c) * splits + split
    tl.store(at, total(s1, LAST), mask=c < C)
    tl.store(at + plane, total(q, LAST), mask=c < C)
    if dx is None:
        tl.store(at + 2 * plane, total(t, LAST), mask=c < C)


@triton.jit
def means_kernel(
    part, sums, means, stats, weight, bias, add, scale, shift, add_n, scale_n, shift_n, C, P, plane, splits,
    GROUP: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """The sums of one group's channels over the splits, and means (N, groups, 2): a1, a2 times rstd."""
    groups = C // GROUP
    n, c0 = tl.program_id(0) // groups, tl.program_id(0) % groups * GROUP
    i, j = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_S)
    valid = i < GROUP
    part += (tl.cast(n, tl.int64) * C + c0) * splits
    s1 = tl.zeros((BLOCK_C, BLOCK_S), tl.float32)
    q, t = tl.zeros_like(s1), tl.zeros_like(s1)
    for s0 in range(0, splits, BLOCK_S):
        at = part + i[:, None] * splits + s0 + j[None, :]
        inside = valid[:, None] & (s0 + j < splits)[None, :]
        s1 += tl.load(at, mask=inside, other=0.0)
        q += tl.load(at + plane, mask=inside, other=0.0)
        t += tl.load(at + 2 * plane, mask=inside, other=0.0)
    s1, q, t = tl.sum(s1, 1), tl.sum(q, 1), tl.sum(t, 1)
    c = c0 + i
    A, _, _, e, rstd = folded(
        n, c, valid, C, stats, weight, bias, add, scale, shift, add_n, scale_n, shift_n, GROUP, BLOCK_C
    )
    s2 = rstd * q + e * s1
    size = GROUP * tl.cast(P, tl.float32)
    a1, a2 = tl.sum(A * s1, 0) / size, tl.sum(A * s2, 0) / size
    tl.store(means + 2 * tl.program_id(0), a1)
    tl.store(means + 2 * tl.program_id(0) + 1, a2)
    keep_sums(sums, n, C, c, valid, s1, s2, A * s1 - rstd * a2 * t - (a1 + e * a2) * P)


@triton.jit
def gradient_kernel(
    dy, x, x2, dx, dx2, means, stats, weight, bias, add, scale, shift, add_n, scale_n, shift_n, C, C1, P, steps, splits,
    GROUP: tl.constexpr, ACT: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, LAST: tl.constexpr, VECTOR: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """dx = A dn - D u - E."""
    n, c0, _, p0, tiles = whereabouts(C, P, steps, splits, BLOCK_C, BLOCK_P, LAST, True)
    c = c0 + tl.arange(0, BLOCK_C)
    valid = c < C
    A, M, B, e, rstd = folded(
        n, c, valid, C, stats, weight, bias, add, scale, shift, add_n, scale_n, shift_n, GROUP, BLOCK_C
    )
    at = means + 2 * (tl.cast(n, tl.int64) * (C // GROUP) + c // GROUP)
    a2 = tl.load(at + 1, mask=valid, other=0.0)
    D, E = rstd * a2, tl.load(at, mask=valid, other=0.0) + e * a2
    for k in range(tiles):
        p = p0 + k * BLOCK_P
        inside = used(C - c0, P - p, BLOCK_C, BLOCK_P, LAST, FULL)
        v = load(x, x2, n, c0, p, C, C1, P, inside, BLOCK_C, BLOCK_P, LAST, VECTOR)
        dn = load(dy, None, n, c0, p, C, C, P, inside, BLOCK_C, BLOCK_P, LAST, VECTOR)
        dn, u = differences(v, dn, A, M, B, inside, ACT, LAST)
        store(gradient(dn, u, A, D, E, LAST), dx, dx2, n, c0, p, C, C1, P, inside, BLOCK_C, BLOCK_P, LAST, VECTOR)


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
    """(dx, dx2, sums): sums (N, C, 3) = sum_p dn, sum_p dn xhat, sum_p dz; dx2 is empty without x2."""
    given = Given.of(x, x2, weight, bias, add, scale, shift)
    processors = tiles.multiprocessors(x.device)
    plan = tiles.choose(*given.sizes, groups, given.last, x.element_size(), processors, backward=True)
    return backward(given, dy, stats, groups, act, plan)


def backward(
    given: Given, dy: Tensor, stats: Tensor, groups: int, act: bool, plan: Tiles
) -> tuple[Tensor, Tensor, Tensor]:
    """`run_backward` with tiles of the caller's choice."""
    x, x2, (n, channels, pixels) = given.x, given.x2, given.sizes
    dy = given.like(dy)
    dx = given.empty(x.shape[1])
    dx2 = None if x2 is None else given.empty(x2.shape[1])
    sums = torch.empty((n, channels, 3), dtype=torch.float32, device=x.device)
    if dy.numel() == 0:
        return dx, x.new_empty(0) if dx2 is None else dx2, sums.zero_()
    numbers, sizes = (stats, *tiles.numbers(given)), (channels, int(x.shape[1]), pixels)
    block, group = tiles.block(given, plan), channels // groups
    if plan.one_pass:
        grid = (n * tiles.blocks(channels, plan.slab),)
        jit.launch(one_pass_kernel, grid)(
            dy, x, x2, dx, dx2, sums, *numbers, *sizes, ACT=act, **block, **tiles.whole_slabs(given, plan, group)
        )
    else:
        part = torch.empty((3, n, channels, plan.splits), dtype=torch.float32, device=x.device)
        means = torch.empty((n, groups, 2), dtype=torch.float32, device=x.device)
        grid = (n * tiles.blocks(channels, plan.block_c) * plan.splits,)
        walk, plane = (plan.steps, plan.splits), n * channels * plan.splits
        jit.launch(sums_kernel, grid)(
            dy, x, x2, None, part, *numbers, *sizes, plane, *walk, GROUP=group, ACT=act, **block
        )
        wide = tiles.power(group)
        jit.launch(means_kernel, (n * groups,))(
            part, sums, means, *numbers, channels, pixels, plane, plan.splits,
            GROUP=group, BLOCK_C=wide, BLOCK_S=min(tiles.power(plan.splits), max(1, tiles.ENTRIES // wide)),
        )  # fmt: skip
        jit.launch(gradient_kernel, grid)(
            dy, x, x2, dx, dx2, means, *numbers, *sizes, *walk, GROUP=group, ACT=act, **block
        )
    return dx, x.new_empty(0) if dx2 is None else dx2, sums
