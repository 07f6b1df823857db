"""The forward process on CPUs: `fastdiff.ops.q_sample` by csrc/cpu/q_sample.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdiff.ops import native, philox, q_sample_call
from fastdiff.ops.q_sample import result_dtype


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
    call = q_sample_call.addressed(x0, t, table, noise, seed, index, where)
    dtype = result_dtype(x0)
    x_t = native.fresh(x0.shape, dtype) if out is None else out
    others = [native.fresh(x0.shape, dtype) if asked else None for asked in (eps, v)]
    native.cpu.q_sample(
        *(*call.images, *call.mask, *call.levels, len(table), *call.key, step, stream),
        *map(native.address, (x_t, *others)),
        *(call.dtype, *call.sizes, torch.get_num_threads()),
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
    if x0.dtype not in native.DTYPES:
        return f"the cpp kernel takes float32, bfloat16, float16 and uint8 images, got {x0.dtype}"
    return native.refuses(x0, t, table, noise, seed, index, where, out)
