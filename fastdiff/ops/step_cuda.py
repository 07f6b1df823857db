"""The reverse step on a GPU: `fastdiff.ops.step_` by csrc/cuda/step.cu."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastdiff.ops import cuda, native

_ROW_DTYPES = (torch.float32, torch.int64, torch.int64, torch.int64)


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
    """`step_` by csrc/cuda/step.cu: row, counter, seed and numbers of the images are read on the device.

    k outside the rows and a SLOT that is none are not noticed.
    """
    if x.numel() == 0:
        return
    n, channels, *space = x.shape
    rows, k, index, seed = (native.dense(a, d) for a, d in zip((rows, k, index, seed), _ROW_DTYPES, strict=True))
    noise = None if noise is None else native.dense(noise, torch.float32)
    F = F if F.dtype in native.FLOATS else F.float()
    F = F if native.strided(F) is not None else F.contiguous()
    network, following = native.strided(F), native.NOTHING if x_in is None else native.strided(x_in)
    assert network is not None
    assert following is not None
    cuda.kernels.step(
        *map(native.address, (x, h)),
        *following,
        x_in is not None and len(x_in) > n,
        *network,
        len(F) > n,
        *map(native.address, (rows, k, index, seed)),
        (None, "range", "moment").index(variance),
        *map(native.address, (noise, bad)),
        *(n, channels, math.prod(space)),
        *cuda.queue(x),
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
    for name, a in (("x", x), ("h", h)):
        if a.dtype != torch.float32:
            return f"the state is float32 in the CUDA kernel, got {name} in {a.dtype}"
    if x_in is not None and (x_in.dtype not in native.FLOATS or native.strided(x_in) is None):
        return (
            f"x_in must be float32, bfloat16 or float16, contiguous or channels_last, got {x_in.dtype} with strides "
            f"{x_in.stride()}"
        )
    if bad is not None and (bad.dtype != torch.int64 or not bad.is_contiguous()):
        return f"bad must be dense int64, got {bad.dtype} with strides {bad.stride()}"
    if native.records_grad(x, x_in, h, F, *numbers, noise):
        return "an argument requires grad and the kernel records none; call it under torch.no_grad()"
    return cuda.refuses(x, x_in, h, F, *numbers, noise, bad)
