"""The forward process on a GPU: `fastdiff.ops.q_sample` by csrc/cuda/q_sample.cu."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastdiff.ops import cuda, native, philox


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
    """`q_sample` by csrc/cuda/q_sample.cu; results are contiguous. t outside the table is not noticed."""
    x0, table = x0.contiguous(), native.dense(table, torch.float32)
    t = native.dense(t, torch.int64)
    seed, index = (None if a is None else native.dense(a, torch.int64) for a in (seed, index))
    if noise is not None:
        noise = native.dense(noise, noise.dtype if noise.dtype in native.FLOATS else torch.float32)
    dtype = x0.dtype if x0.is_floating_point() else torch.float32
    new = [x0.new_empty(x0.shape, dtype=dtype) if asked else None for asked in (out is None, eps, v)]
    outs = [out if out is not None else new[0], *new[1:]]
    if x0.numel() == 0:
        return [a for a in outs if a is not None]
    mask = None if where is None else _mask(where, x0)
    cuda.kernels.q_sample(
        *(x0.data_ptr(), native.DTYPES[x0.dtype]),
        *(native.address(noise), 0 if noise is None else native.DTYPES[noise.dtype]),
        *map(native.address, (t, table, seed, index)),
        *(step, stream),
        *_mask_address(mask),
        *map(native.address, outs),
        *(native.DTYPES[dtype], *x0.shape[:2], math.prod(x0.shape[2:])),
        *cuda.queue(x0),
    )
    return [a for a in outs if a is not None]


def _mask(where: Tensor, x0: Tensor) -> Tensor:
    """The mask in x0's shape, without a copy where strides of 0 can say it."""
    mask = where.view(torch.uint8).expand(x0.shape)
    return mask if native.strided(mask) is not None else mask.contiguous()


def _mask_address(mask: Tensor | None) -> tuple[int, int, int, int]:
    strided = native.NOTHING if mask is None else native.strided(mask)
    assert strided is not None
    return strided.data, strided.image, strided.channel, strided.pixel


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
        return f"the CUDA kernel takes float32, bfloat16, float16 and uint8 images, got {x0.dtype}"
    if x0.ndim < 2:
        return f"the CUDA kernel takes images (N, C, *spatial), got {tuple(x0.shape)}"
    return cuda.refuses(x0, t, table, noise, seed, index, where, out)
