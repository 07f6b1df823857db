"""The forward process on CPUs: `fastdiff.ops.q_sample` by csrc/cpu/q_sample.cpp."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastdiff.ops import native, philox


def _mask(where: Tensor, shape: torch.Size) -> Tensor:
    """The mask's bytes, expanded to `shape` in strides that the kernel can follow."""
    mask = where.view(torch.uint8)
    if native.steps(mask.expand(shape)) is None:
        # broadcast along some of the spatial axes only, or transposed
        mask = mask.expand(*where.shape[:2], *shape[2:]).clone(memory_format=torch.contiguous_format)
    return mask.expand(shape)


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
    """`q_sample` in one pass; fresh results are contiguous. Raises IndexError where t is outside the table."""
    x0, table = x0.contiguous(), native.dense(table, torch.float32)
    t = native.dense(t, torch.int64)
    seed, index = (None if a is None else native.dense(a, torch.int64) for a in (seed, index))
    if noise is not None:
        noise = native.dense(noise, noise.dtype if noise.dtype in native.FLOATS else torch.float32)
    mask = None if where is None else _mask(where, x0.shape)
    dtype = x0.dtype if x0.is_floating_point() else torch.float32
    x_t = native.fresh(x0.shape, dtype) if out is None else out
    others = [native.fresh(x0.shape, dtype) if asked else None for asked in (eps, v)]
    native.cpu.q_sample(
        *(x0.data_ptr(), native.DTYPES[x0.dtype]),
        *(native.address(noise), 0 if noise is None else native.DTYPES[noise.dtype]),
        *(native.address(mask), *((0, 0, 0) if mask is None else native.steps(mask) or ())),
        *map(native.address, (t, table)),
        len(table),
        *map(native.address, (seed, index)),
        *(step, stream),
        *map(native.address, (x_t, *others)),
        native.DTYPES[dtype],
        *(len(x0), math.prod(x0.shape[1:2]), math.prod(x0.shape[2:]), torch.get_num_threads()),
    )
    return [x_t, *(a for a in others if a is not None)]


def refuses(
    x0: Tensor,
    t: Tensor,
    table: Tensor,
    *,
    noise: Tensor | None = None,
    seed: Tensor | None = None,
    index: Tensor | None = None,
    where: Tensor | None = None,
    out: Tensor | None = None,
    **_: object,
) -> str | None:
    """Why the kernel does not take these arguments, None when it does."""
    if native.records_grad(table):
        return "the kernels have no gradient of the schedule's table"
    if x0.dtype not in native.DTYPES:
        return f"the cpp kernel takes float32, bfloat16, float16 and uint8 images, got {x0.dtype}"
    return native.refuses(x0, t, table, noise, seed, index, where, out)
