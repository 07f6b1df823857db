"""Sinusoidal features on GPUs: `fastdiff.ops.time_embed` as a Triton kernel.

The angle is taken in turns, t g with g = scale f / 2 pi from a table made in float64, and its whole turns are dropped
before anything is rounded: t is split in 2 and g in 4 parts of 12 bits, so that each product is exact in fp32.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdiff.ops import jit, native
from fastdiff.ops.philox_triton import images_grid, this_image, turn

PARTS = 4
_PARTS = tl.constexpr(PARTS)


@triton.jit
def _add(total, below, turns):
    """total + below + turns, less whole turns; what rounding takes off the first sum is kept in below."""
    turns = turns - tl.floor(turns + 0.5)
    higher = total + turns
    added = higher - total
    return higher, below + ((total - (higher - added)) + (turns - added))


@triton.jit(do_not_specialize=["images"])
def time_embed_kernel(t, parts, e, images, half, dim, FLIP: tl.constexpr, COUNT: tl.constexpr):
    """COUNT frequencies of one time: parts (PARTS, half), e (images, dim)."""
    n = this_image()
    if n >= images:
        return
    j = tl.program_id(0) * COUNT + tl.arange(0, COUNT)
    inside = j < half
    time = tl.load(t + n).to(tl.float32)
    high = (time.to(tl.int32, bitcast=True) & -4096).to(tl.float32, bitcast=True)
    low = time - high
    turns = tl.zeros([COUNT], tl.float32)
    below = tl.zeros([COUNT], tl.float32)
    for part in tl.static_range(_PARTS):
        g = tl.load(parts + part * half + j, mask=inside, other=0)
        turns, below = _add(turns, below, high * g)
        turns, below = _add(turns, below, low * g)
    cosine, sine = turn(turns, below)
    first, second = (cosine, sine) if FLIP else (sine, cosine)
    line = e + n.to(tl.int64) * dim
    tl.store(line + j, first.to(e.dtype.element_ty), mask=inside)
    tl.store(line + half + j, second.to(e.dtype.element_ty), mask=inside)
    # an odd dim ends in a zero
    tl.store(line + 2 * half + j, tl.zeros([COUNT], e.dtype.element_ty), mask=2 * half + j < dim)


def _table(dim: int, max_period: float, shift: float, scale: float, device: torch.device) -> Tensor:
    """scale f_j / 2 pi as PARTS numbers of 12 bits each, (PARTS, dim / 2)."""
    half = dim // 2
    j = torch.arange(half, dtype=torch.float64, device=device)
    left = scale / (2 * math.pi) * torch.exp(-math.log(max_period) / (half - shift) * j)
    parts = []
    for _ in range(PARTS):
        parts.append((left.to(torch.float32).view(torch.int32) & -4096).view(torch.float32))
        left = left - parts[-1]
    return torch.stack(parts)


_kept_table = functools.lru_cache(maxsize=64)(_table)


def _maker(device: torch.device) -> Callable[..., Tensor]:
    """`_table`: once and for all, but anew as part of a graph that is being traced or captured."""
    traced = jit.traced()
    captured = device.type == "cuda" and not traced and torch.cuda.is_current_stream_capturing()
    return _table if traced or captured else _kept_table


def run(
    t: Tensor,
    dim: int,
    *,
    max_period: float = 10000.0,
    flip: bool = False,
    shift: float = 0.0,
    scale: float = 1.0,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """`time_embed` as a Triton kernel."""
    e = torch.empty((len(t), dim), dtype=dtype or torch.float32, device=t.device)
    if not e.numel():
        return e
    table = _maker(t.device)(dim, max_period, shift, scale, t.device)
    half = dim // 2
    count = min(triton.next_power_of_2(max(half, 32)), 256)
    # dim = 1 has no frequency, but a zero to write
    grid = images_grid(max(triton.cdiv(half, count), 1), len(t))
    jit.launch(time_embed_kernel, grid)(t.contiguous(), table, e, len(t), half, dim, FLIP=flip, COUNT=count)
    return e


def refuses(
    t: Tensor,
    dim: int,
    *,
    max_period: float = 10000.0,
    flip: bool = False,
    shift: float = 0.0,
    scale: float = 1.0,
    dtype: torch.dtype | None = None,
) -> str | None:
    """Why the kernel does not take these arguments, None when it does."""
    if t.dtype == torch.float64 or t.is_complex():
        return f"the Triton kernel computes in float32, got times in {t.dtype}"
    if dtype is not None and dtype not in native.FLOATS:
        return f"the Triton kernel writes float32, bfloat16 and float16, not {dtype}"
    return jit.refuses(t)
