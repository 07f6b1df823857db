"""The forward process on CPUs: `fastdiff.ops.q_sample` by csrc/cpu/q_sample.cpp."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastdiff.ops import native, philox


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
    """`q_sample` by csrc/cpu/q_sample.cpp; results are contiguous."""
    x0, table = x0.contiguous(), native.dense(table, torch.float32)
    t = native.dense(t, torch.int64)
    seed, index = (None if a is None else native.dense(a, torch.int64) for a in (seed, index))
    if noise is not None:
        noise = native.dense(noise, noise.dtype if noise.dtype in native.FLOATS else torch.float32)
    dtype = x0.dtype if x0.is_floating_point() else torch.float32
    outs = [torch.empty(x0.shape, dtype=dtype) if asked else None for asked in (True, eps, v)]
    native.cpu.q_sample(
        *(x0.data_ptr(), native.DTYPES[x0.dtype]),
        *(native.address(noise), 0 if noise is None else native.DTYPES[noise.dtype]),
        *map(native.address, (t, table)),
        len(table),
        *map(native.address, (seed, index)),
        *(step, stream),
        *map(native.address, outs),
        *(native.DTYPES[dtype], len(x0), math.prod(x0.shape[1:]), torch.get_num_threads()),
    )
    return [out for out in outs if out is not None]


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
    if where is not None or out is not None:
        return "the cpp kernel takes no where= and no out= yet"
    if native.records_grad(table):
        return "the kernels have no gradient of the schedule's table"
    if x0.dtype not in native.DTYPES:
        return f"the cpp kernel takes float32, bfloat16, float16 and uint8 images, got {x0.dtype}"
    return native.refuses(x0, t, table, noise, seed, index)
