"""The reverse step on CPUs: `fastdiff.ops.step_` by csrc/cpu/step.cpp."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastdiff.ops import native

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
    """`step_` by csrc/cpu/step.cpp: one pass over the state, x_in and F read and written by stride."""
    n, channels, *space = x.shape
    if bad is not None and (bad.dtype != torch.int64 or not bad.is_contiguous()):
        raise ValueError(f"step_: bad must be dense int64, got {bad.dtype} with strides {bad.stride()}")
    rows, k, index, seed = (native.dense(a, d) for a, d in zip((rows, k, index, seed), _ROW_DTYPES, strict=True))
    noise = None if noise is None else native.dense(noise, torch.float32)
    F = F if F.dtype in native.FLOATS else F.float()
    network = native.strided(F)
    if network is None:
        F = F.contiguous()
        network = native.strided(F)
    following = native.NOTHING if x_in is None else native.strided(x_in)
    assert network is not None
    assert following is not None
    native.cpu.step(
        *(x.data_ptr(), h.data_ptr()),
        *following,
        x_in is not None and len(x_in) > n,
        *network,
        len(F) > n,
        *(rows.data_ptr(), len(rows)),
        *map(native.address, (k, index, seed)),
        (None, "range", "moment").index(variance),
        *map(native.address, (noise, bad)),
        *(n, channels, math.prod(space), torch.get_num_threads()),
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
            return f"the state is float32 in the cpp kernel, got {name} in {a.dtype}"
    if x_in is not None and (x_in.dtype not in native.FLOATS or native.steps(x_in) is None):
        return (
            f"x_in must be float32, bfloat16 or float16, contiguous or channels_last, got {x_in.dtype} with strides "
            f"{x_in.stride()}"
        )
    if native.records_grad(x, x_in, h, F, *numbers, noise):
        return "an argument requires grad and the kernel records none; call it under torch.no_grad()"
    return native.refuses(x, x_in, h, F, *numbers, noise, bad)
