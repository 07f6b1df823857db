"""The forward process on GPUs: `fastdiff.ops.q_sample` as a Triton kernel."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdiff.ops import jit, native, philox
from fastdiff.ops.philox_triton import blocks_of, counter_word, images_grid, normals, oversized, run_length, this_image
from fastdiff.ops.q_sample import result_dtype


@triton.jit
def _pixels(x):
    """The image that is stored as floats, or as uint8 pixels: u / 127.5 - 1, with one rounding."""
    if x.dtype == tl.uint8:
        return (x.to(tl.float32) - 127.5) * 0.00784313725490196
    else:
        return x.to(tl.float32)


@triton.jit
def _drawn(where, n, i, inside, of_image, of_channel, of_pixel, pixels, FLAT: tl.constexpr):
    """The mask by its strides; FLAT where channel and pixel advance in one stride."""
    at = i * of_pixel if FLAT else i // pixels * of_channel + i % pixels * of_pixel
    return tl.load(where + n * of_image + at, mask=inside, other=0).to(tl.int1)


@triton.jit(do_not_specialize=["step_and_stream", "images"])
def q_sample_kernel(
    x0, t, table, noise, seed, index, where, x_t, eps, v,
    step_and_stream, images, size, of_image, of_channel, of_pixel, pixels,
    FLAT: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    """One block, COUNT numbers of one image: the two numbers of its t are scalars."""
    n = this_image()
    if n >= images:
        return
    line = table + 2 * tl.load(t + n)
    alpha, sigma = tl.load(line), tl.load(line + 1)
    n = n.to(tl.int64)
    first = tl.program_id(0) * COUNT
    i = first + tl.arange(0, COUNT)
    inside = i < size
    x = _pixels(tl.load(x0 + n * size + i, mask=inside, other=0))
    if noise is None:
        wide: tl.constexpr = x_t.dtype.element_ty.primitive_bitwidth == 16
        block = blocks_of(first, COUNT, wide)
        z = normals(tl.load(seed), block, step_and_stream, tl.load(index + n), [COUNT], wide)
    else:
        z = tl.load(noise + n * size + i, mask=inside, other=0).to(tl.float32)
    y = alpha * x + sigma * z
    if where is not None:
        y = tl.where(_drawn(where, n, i, inside, of_image, of_channel, of_pixel, pixels, FLAT), y, x)
    tl.store(x_t + n * size + i, y.to(x_t.dtype.element_ty), mask=inside)
    if eps is not None:
        tl.store(eps + n * size + i, z.to(eps.dtype.element_ty), mask=inside)
    if v is not None:
        tl.store(v + n * size + i, (alpha * z - sigma * x).to(v.dtype.element_ty), mask=inside)


def _mask(where: Tensor | None, x0: Tensor) -> tuple[Tensor | None, int, int, int, bool]:
    """(the mask, its strides over images, channels and pixels, whether the last two are one)."""
    if where is None:
        return None, 0, 0, 0, True
    spatial = tuple(where.shape[2:])
    if spatial != tuple(x0.shape[2:]) and max(spatial, default=1) > 1:
        # it broadcasts over some spatial axes and not over others
        where = where.expand(*where.shape[:2], *x0.shape[2:])
    where = where.contiguous()
    of_pixel = 1 if math.prod(where.shape[2:]) > 1 else 0
    of_image = math.prod(where.shape[1:]) if where.shape[0] > 1 else 0
    of_channel = math.prod(where.shape[2:]) if where.shape[1] > 1 else 0
    flat = x0.shape[1] == 1 or of_channel == of_pixel * math.prod(x0.shape[2:])
    return where, of_image, of_channel, of_pixel, flat


def run(
    x0: Tensor,
    t: Tensor,
    table: Tensor,
    *,
    noise: Tensor | None = None,
    seed: Tensor | None = None,
    index: Tensor | None = None,
    where: Tensor | None = None,
    step: int = 0,
    stream: int = philox.Q_SAMPLE,
    eps: bool = False,
    v: bool = False,
    out: Tensor | None = None,
) -> list[Tensor]:
    """`q_sample` as a Triton kernel; results are contiguous. A t outside the table is read as it lies in memory."""
    dtype = result_dtype(x0)
    results = [torch.empty(x0.shape, dtype=dtype, device=x0.device) for _ in range((out is None) + eps + v)]
    results = results if out is None else [out, *results]
    if not x0.numel():
        return results
    given = iter(results[1:])
    mask, *strides, flat = _mask(where, x0)
    size, pixels = math.prod(x0.shape[1:]), math.prod(x0.shape[2:])
    count = run_length(x0.numel())
    jit.launch(q_sample_kernel, images_grid(triton.cdiv(size, count), len(x0)))(
        *(x0.contiguous(), native.dense(t, torch.int64), native.dense(table, torch.float32)),
        None if noise is None else noise.contiguous(),
        *(None if a is None else native.dense(a, torch.int64) for a in (seed, index)),
        *(mask, results[0], next(given) if eps else None, next(given) if v else None),
        *(counter_word(step, stream), len(x0), size, *strides, pixels),
        FLAT=flat,
        COUNT=count,
    )
    return results


def refuses(
    x0: Tensor,
    t: Tensor,
    table: Tensor,
    *,
    noise: Tensor | None = None,
    seed: Tensor | None = None,
    index: Tensor | None = None,
    where: Tensor | None = None,
    step: int = 0,
    stream: int = philox.Q_SAMPLE,
    eps: bool = False,
    v: bool = False,
    out: Tensor | None = None,
) -> str | None:
    """Why the kernel does not take these arguments, None when it does."""
    if x0.dtype not in native.DTYPES:
        return f"the Triton kernel takes float32, bfloat16, float16 and uint8 images, got {x0.dtype}"
    return oversized(x0, noise) or jit.refuses(x0, t, table, noise, seed, index, where, out)
