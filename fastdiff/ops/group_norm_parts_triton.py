"""What the Triton kernels of group_norm_silu and inject share: tiles of two tensors, exact sums, A, M, B and the SiLU.

A tile holds BLOCK_C channels from c0 and BLOCK_P pixels from p0 of image n; its axes are those of memory, (channel,
pixel), or with LAST, for channels_last, (pixel, channel). A tensor in two parts is x with C1 channels, x2 the others.
"""

import triton
import triton.language as tl

from fastdiff.ops import jit

INTERPRETED = tl.constexpr(jit.INTERPRETED)


@triton.jit
def along(v, LAST: tl.constexpr):
    """One number a channel, as it meets a tile."""
    return v[None, :] if LAST else v[:, None]


@triton.jit
def total(v, LAST: tl.constexpr):
    """Over the pixels of a tile."""
    return tl.sum(v, 0) if LAST else tl.sum(v, 1)


@triton.jit
def used(channels, pixels, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, LAST: tl.constexpr, FULL: tl.constexpr):
    """Which entries of a tile lie in the tensor, which has that many more of both.

    With FULL all do, and the compiler drops the mask; where `channels` is a constant it drops registers.
    """
    if FULL:
        return tl.full((BLOCK_P, BLOCK_C) if LAST else (BLOCK_C, BLOCK_P), True, tl.int1)
    else:
        return along(tl.arange(0, BLOCK_C) < channels, LAST) & along(tl.arange(0, BLOCK_P) < pixels, not LAST)


@triton.jit
def place(n, c0, p0, C, P, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, LAST: tl.constexpr, VECTOR: tl.constexpr):
    """Offsets of a tile: the first in 64 bits, the others from it in 32."""
    c, p = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_P)
    image, p0 = tl.cast(n, tl.int64), tl.cast(p0, tl.int64)
    # VECTOR divides the length of a row: said here, it lets a row of 8 be one word
    if LAST:
        C = C // VECTOR * VECTOR
        return (image * P + p0) * C + c0, p[:, None] * C + c[None, :]
    else:
        P = P // VECTOR * VECTOR
        return (image * C + c0) * P + p0, c[:, None] * P + p[None, :]


@triton.jit
def load(
    x, x2, n, c0, p0, C, C1, P, inside,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, LAST: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """A tile of cat([x, x2], 1) in fp32, 0 outside."""
    first, tile = place(n, c0, p0, C1, P, BLOCK_C, BLOCK_P, LAST, VECTOR)
    if x2 is None:
        return tl.load(x + first + tile, mask=inside, other=0.0).to(tl.float32)
    else:
        ours = along(c0 + tl.arange(0, BLOCK_C) < C1, LAST)
        first2, tile2 = place(n, c0 - C1, p0, C - C1, P, BLOCK_C, BLOCK_P, LAST, VECTOR)
        a = tl.load(x + first + tile, mask=inside & ours, other=0.0)
        b = tl.load(x2 + first2 + tile2, mask=inside & (ours == 0), other=0.0)
        return tl.where(ours, a, b).to(tl.float32)


@triton.jit
def store(
    v, y, y2, n, c0, p0, C, C1, P, inside,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, LAST: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """A tile into y, or split as `load` joins."""
    v = v.to(y.dtype.element_ty)
    first, tile = place(n, c0, p0, C1, P, BLOCK_C, BLOCK_P, LAST, VECTOR)
    if y2 is None:
        tl.store(y + first + tile, v, mask=inside)
    else:
        ours = along(c0 + tl.arange(0, BLOCK_C) < C1, LAST)
        first2, tile2 = place(n, c0 - C1, p0, C - C1, P, BLOCK_C, BLOCK_P, LAST, VECTOR)
        tl.store(y + first + tile, v, mask=inside & ours)
        tl.store(y2 + first2 + tile2, v, mask=inside & (ours == 0))


@triton.jit
def whereabouts(
    C, P, steps, splits, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, LAST: tl.constexpr, AGAIN: tl.constexpr
):
    """Image, first channel, split, first pixel and number of tiles of a block that walks.

    AGAIN, for a second pass over a tensor, starts where the first one ended: that is still in the cache.
    """
    i = tl.program_id(0)
    if AGAIN:
        i = tl.num_programs(0) - 1 - i
    rows = tl.cdiv(C, BLOCK_C)
    # blocks that run together read memory that lies together
    if LAST:
        row, i = i % rows, i // rows
        split, n = i % splits, i // splits
    else:
        split, i = i % splits, i // splits
        row, n = i % rows, i // rows
    p0 = split * (steps * BLOCK_P)
    return n, row * BLOCK_C, split, p0, tl.minimum(steps, tl.cdiv(P - p0, BLOCK_P))


@triton.jit
def two_sum(a, b):
    """a + b rounded, and what the rounding lost."""
    s = a + b
    t = s - a
    return s, (a - (s - t)) + (b - t)


@triton.jit
def group_sum(v, GROUP: tl.constexpr, GROUPS: tl.constexpr, BLOCK_C: tl.constexpr):
    """To each channel of a slab the sum over its group; v is 0 outside the slab. GROUPS: a power of two."""
    if GROUPS == 1:
        return tl.full((BLOCK_C,), 0.0, tl.float32) + tl.sum(v, 0)
    else:
        mine = (tl.arange(0, BLOCK_C) // GROUP)[None, :] == tl.arange(0, GROUPS)[:, None]
        sums = tl.sum(tl.where(mine, v[None, :], 0.0), 1)
        return tl.sum(tl.where(mine, sums[:, None], 0.0), 0)


@triton.jit
def numbers(v, n, stride, c, valid, otherwise: tl.constexpr, BLOCK_C: tl.constexpr):
    """One number a channel of image n from v, (C,) with stride 0 or (N, C); `otherwise` where there is no v."""
    if v is None:
        return tl.full((BLOCK_C,), otherwise, tl.float32)
    else:
        return tl.load(v + tl.cast(n, tl.int64) * stride + c, mask=valid, other=0.0)


@triton.jit
def statistics(stats, n, c, valid, C, GROUP: tl.constexpr):
    """mean, its fp32 remainder, and rstd of the group of each channel."""
    at = stats + 3 * (tl.cast(n, tl.int64) * (C // GROUP) + c // GROUP)
    hi, lo = tl.load(at, mask=valid, other=0.0), tl.load(at + 1, mask=valid, other=0.0)
    return hi, lo, tl.load(at + 2, mask=valid, other=0.0)


@triton.jit
def coefficients(hi, lo, rstd, add, weight, bias, gain, shift):
    """A, M, B of n = A (x - M) + B, and e of xhat = rstd (x - M) + e, for z = x + add with mean hi + lo.

    M is mean - add rounded, and B carries what that lost: n keeps its digits where the mean is 1e4 times the deviation.
    """
    m, rest = two_sum(hi, -add)
    rest += lo
    M = m + rest
    e = rstd * ((M - m) - rest)
    return rstd * weight * gain, M, (bias + weight * e) * gain + shift, e


@triton.jit
def sigmoid(n):
    """1 / (1 + exp(-n)). NVIDIA's exponential and reciprocal to 2 ulp, without Triton's care for denormal numbers."""
    t = n * -1.4426950408889634
    if INTERPRETED:
        return 1.0 / (1.0 + tl.exp2(t))
    elif tl.target_info.is_cuda():
        asm: tl.constexpr = (
            "{.reg .f32 e; ex2.approx.ftz.f32 e, $1; add.f32 e, e, 0f3F800000; rcp.approx.ftz.f32 $0, e;}"
        )
        return tl.inline_asm_elementwise(asm, "=f,f", [t], dtype=tl.float32, is_pure=True, pack=1)
    else:
        return 1.0 / (1.0 + tl.exp2(t))


@triton.jit
def silu_slope(n):
    """The derivative of n sigmoid(n)."""
    s = sigmoid(n)
    return s * (1.0 + n * (1.0 - s))
