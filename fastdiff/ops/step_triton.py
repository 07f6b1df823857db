"""The reverse step on GPUs: `fastdiff.ops.step_` as one Triton kernel.

Compile-time are layout, dtypes, guidance, the kind of variance, and which optional tensors are there. All else comes
from the row: what its zeros switch off is neither loaded, stored nor drawn, only x and F are loaded before the row is
known, so that their latency hides its.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdiff import row
from fastdiff.ops import jit, native, philox, step_call
from fastdiff.ops.philox_triton import (
    INTERPRETED,
    blocks_of,
    images_grid,
    normals,
    normals_at,
    oversized,
    run_length,
    this_image,
)

_COLUMNS = tl.constexpr(row.COLUMNS)
_C_IN, _C_SKIP, _C_OUT, _W = (tl.constexpr(c) for c in (row.C_IN, row.C_SKIP, row.C_OUT, row.W))
_A, _B0, _BF, _B1, _S = (tl.constexpr(c) for c in (row.A, row.B0, row.BF, row.B1, row.S))
_P, _Q, _SLOT, _CLIP = (tl.constexpr(c) for c in (row.P, row.Q, row.SLOT, row.CLIP))
_ALPHA, _SIGMA, _V0 = (tl.constexpr(c) for c in (row.ALPHA, row.SIGMA, row.V0))
_STREAM = tl.constexpr(philox.STEP << 24)


@triton.jit
def _is(condition):
    """The condition itself: the interpreter broadcasts comparisons of integers, and not those of floats."""
    return tl.where(condition, 1, 0) == 1


@triton.jit
def _add(total, coefficient, operand):
    """total + coefficient operand; where the coefficient is zero nothing that lies in the operand does harm."""
    if coefficient != 0:
        total += coefficient * operand
    return total


@triton.jit
def _bounded(v, low, high):
    """v between two bounds; NaN stays NaN."""
    if INTERPRETED or tl.target_info.is_hip() or tl.target_info.cuda_capability_geq(8, 0):
        return tl.clamp(v, low, high, propagate_nan=tl.PropagateNan.ALL)
    else:
        # sm_75 has no min.NaN
        return tl.where(v != v, v, tl.clamp(v, low, high))  # noqa: PLR0124


@triton.jit
def _deviation(x, raw, second, r, VARIANCE: tl.constexpr):
    """sqrt(s2) of the two kinds in fastdiff/ops/step.py."""
    v0, v1 = tl.load(r + _V0), tl.load(r + _V0 + 1)
    if VARIANCE == "range":
        return tl.exp(0.5 * (v0 + (second + 1) * 0.5 * (v1 - v0)))
    else:
        eps = (x - tl.load(r + _ALPHA) * raw) / tl.load(r + _SIGMA)
        s2 = v0 + v1 * second + tl.load(r + _V0 + 2) * (eps * eps)
        return tl.sqrt(_bounded(_bounded(s2, v0, float("inf")), float("-inf"), tl.load(r + _V0 + 3)))


@triton.jit
def _noise(noise, at, inside, seed, index, k, first, c, pixels, CHANNELS: tl.constexpr, COUNT: tl.constexpr,
           SHARED: tl.constexpr):  # fmt: skip
    """z of the tile: given, or Philox stream 1 of row k."""
    if noise is not None:
        return tl.load(noise + at, mask=inside, other=0)
    else:
        key, image, counter = tl.load(seed), tl.load(index), k.to(tl.int32) | _STREAM
        if CHANNELS == 1:
            return normals(key, blocks_of(first, COUNT, False), counter, image, [COUNT], False)
        elif SHARED:
            block = c * (pixels // 4) + blocks_of(first, COUNT, False)[None, :]
            return normals(key, block, counter, image, [CHANNELS, COUNT], False)
        else:
            return normals_at(key, c * pixels + first + tl.arange(0, COUNT)[None, :], counter, image)


@triton.jit
def _guided(f, unconditional, inside, r):
    """F_u + W (F_c - F_u)."""
    w = tl.load(r + _W)
    u = tl.load(unconditional, mask=inside & _is(w != 1), other=0).to(tl.float32)
    if w != 1:
        f = u + w * (f - u)
    return f


@triton.jit
def _combined(x, f, x0, r):
    """A x + B0 x0 + BF F."""
    y = _add(tl.zeros_like(x), tl.load(r + _A), x)
    return _add(_add(y, tl.load(r + _B0), x0), tl.load(r + _BF), f)


@triton.jit
def _with_history(y, of_h, slot_size, inside, r):
    """y + B1 h1 + B2 h2 + B3 h3."""
    b1, b2, b3 = tl.load(r + _B1), tl.load(r + _B1 + 1), tl.load(r + _B1 + 2)
    if (b1 != 0) | (b2 != 0) | (b3 != 0):
        h1 = tl.load(of_h, mask=inside & _is(b1 != 0), other=0)
        h2 = tl.load(of_h + slot_size, mask=inside & _is(b2 != 0), other=0)
        h3 = tl.load(of_h + 2 * slot_size, mask=inside & _is(b3 != 0), other=0)
        # what is not loaded is zero
        y += b1 * h1 + b2 * h2 + b3 * h3
    return y


@triton.jit
def _remember(of_h, slot_size, inside, x, x0, r):
    """h[SLOT] = P x + Q x0."""
    p, q = tl.load(r + _P), tl.load(r + _Q)
    if (p != 0) | (q != 0):
        remembered = _add(_add(tl.zeros_like(x), p, x), q, x0)
        wanted = tl.load(r + _SLOT)
        # an address made from the row would have torch.compile believe that the rows are written to
        for slot in tl.static_range(3):
            tl.store(of_h + slot * slot_size, remembered, mask=inside & _is(wanted == slot))


@triton.jit
def _note(of_bad, y, inside, k, NUMBERS: tl.constexpr, OUTSIDE: tl.constexpr):
    """Write k where it is negative and y is not finite; OUTSIDE says that y may be so outside of the image."""
    # 0 * y is 0 or NaN; a sum within each thread, and the threads that find the image broken write the same number
    found = (tl.where(inside, y, 0.0) if OUTSIDE else y) * 0.0
    found = tl.sum(tl.sum(found.reshape([NUMBERS // 512, 128, 4]), 2), 0)
    tl.store(of_bad + tl.zeros([128], tl.int32), k, mask=(found != 0) & (tl.load(of_bad) < 0))


@triton.jit(do_not_specialize=["images"])
def step_kernel(
    x, x_in, h, F, rows, k, index, seed, noise, bad,
    images, channels, pixels, channel_blocks, second,
    F_image, F_channel, F_pixel, in_image, in_channel, in_pixel,
    GUIDED: tl.constexpr, DOUBLED: tl.constexpr, VARIANCE: tl.constexpr,
    CHANNELS: tl.constexpr, COUNT: tl.constexpr, SHARED: tl.constexpr,
):  # fmt: skip
    """One tile of CHANNELS x COUNT numbers of one image; CHANNELS = 1 is a run through all its channels."""
    n = this_image()
    if n >= images:
        return
    first = tl.program_id(0) // channel_blocks * COUNT
    if CHANNELS == 1:
        c = 0
        p = first + tl.arange(0, COUNT)
        inside = p < pixels
    else:
        c = tl.program_id(0) % channel_blocks * CHANNELS + tl.arange(0, CHANNELS)[:, None]
        p = first + tl.arange(0, COUNT)[None, :]
        inside = (c < channels) & (p < pixels)
    n, images = n.to(tl.int64), tl.cast(images, tl.int64)
    i = n * (channels * pixels) + c * pixels + p
    of_F = F + n * F_image + (c * F_channel + p * F_pixel)

    xv = tl.load(x + i, mask=inside, other=0)
    f = tl.load(of_F, mask=inside, other=0).to(tl.float32)
    row_k = tl.load(k)
    r = rows + row_k * _COLUMNS
    if GUIDED:
        f = _guided(f, of_F + images * F_image, inside, r)
    raw = _add(_add(tl.zeros_like(xv), tl.load(r + _C_SKIP), xv), tl.load(r + _C_OUT), f)
    bound = tl.load(r + _CLIP)
    x0 = _bounded(raw, -bound, bound)
    slot_size = images * (channels * pixels)
    y = _with_history(_combined(xv, f, x0, r), h + i, slot_size, inside, r)
    s = tl.load(r + _S)
    if s != 0:
        z = _noise(noise, i, inside, seed, index + n, row_k, first, c, pixels, CHANNELS, COUNT, SHARED)
        if VARIANCE is not None:
            z *= _deviation(xv, raw, tl.load(of_F + second, mask=inside, other=0).to(tl.float32), r, VARIANCE)
        y += s * z

    _remember(h + i, slot_size, inside, xv, x0, r)
    tl.store(x + i, y, mask=inside)
    if bad is not None:
        _note(bad + n, y, inside, row_k, CHANNELS * COUNT, VARIANCE == "moment")
    if x_in is not None:
        following = (tl.load(r + _COLUMNS + _C_IN) * y).to(x_in.dtype.element_ty)
        of_in = x_in + n * in_image + (c * in_channel + p * in_pixel)
        tl.store(of_in, following, mask=inside)
        if DOUBLED:
            tl.store(of_in + images * in_image, following, mask=inside)


def _dense(strides: tuple[int, int, int], channels: int, pixels: int) -> bool:
    """Whether the numbers of an image lie in one run."""
    _, channel, pixel = strides
    return (pixel == 1 or pixels == 1) and (channel == pixels or channels == 1)


def _tile(channels: int, numbers: int, dense: bool) -> tuple[int, int]:
    """(channels, pixels) of a tile, powers of two."""
    count = run_length(numbers)
    wide = 1 if dense else min(triton.next_power_of_2(channels), 64)
    return wide, count // wide


def run(
    x: Tensor,
    x_in: Tensor | None,
    h: Tensor,
    F: Tensor,
    rows: Tensor,
    k: Tensor,
    index: Tensor,
    seed: Tensor,
    *,
    variance: str | None = None,
    noise: Tensor | None = None,
    bad: Tensor | None = None,
) -> None:
    """`step_` as a Triton kernel: one pass over the state, x_in and F read and written by stride."""
    if not x.numel():
        return
    n, channels, pixels = len(x), x.shape[1], math.prod(x.shape[2:])
    F = step_call.readable(F)
    network = native.steps(F)
    assert network is not None
    following = (0, pixels, 1) if x_in is None else native.steps(x_in)
    assert following is not None
    second = channels * network[1]
    if dense := _dense(network, channels, pixels) and _dense(following, channels, pixels):
        channels, pixels = 1, channels * pixels
        network, following = (network[0], 0, 1), (following[0], 0, 1)
    wide, count = _tile(channels, x.numel(), dense)
    channel_blocks = triton.cdiv(channels, wide)
    jit.launch(step_kernel, images_grid(triton.cdiv(pixels, count) * channel_blocks, n))(
        *(x, x_in, h, F, native.dense(rows, torch.float32), *(native.dense(a, torch.int64) for a in (k, index, seed))),
        *(None if noise is None else native.dense(noise, torch.float32), bad),
        *(n, channels, pixels, channel_blocks, second),
        *(*network, *following),
        GUIDED=len(F) > n,
        DOUBLED=x_in is not None and len(x_in) > n,
        VARIANCE=variance,
        CHANNELS=wide,
        COUNT=count,
        SHARED=pixels % 4 == 0,
    )


def refuses(
    x: Tensor,
    x_in: Tensor | None,
    h: Tensor,
    F: Tensor,
    *numbers: Tensor,
    variance: str | None = None,
    noise: Tensor | None = None,
    bad: Tensor | None = None,
) -> str | None:
    """Why the kernel does not take these arguments, None when it does."""
    return (
        step_call.refuses("Triton", x, x_in, h, bad)
        or oversized(x, x_in, F, noise)
        or jit.refuses(x, x_in, h, F, *numbers, noise, bad)
    )
