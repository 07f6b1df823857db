"""Sinusoidal features on CPUs: `fastdiff.ops.time_embed` by csrc/cpu/time_embed.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdiff.ops import native


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
    """`time_embed` with frequencies, angles, sines and cosines in float64, rounded to fp32 and then to dtype."""
    t = native.dense(t, torch.float32 if t.is_floating_point() else torch.int64)
    e = t.new_empty((len(t), dim), dtype=dtype or torch.float32)
    native.cpu.time_embed(
        *(t.data_ptr(), t.dtype == torch.int64),
        *(max_period, shift, scale, flip),
        *(e.data_ptr(), native.DTYPES[e.dtype], len(t), dim, torch.get_num_threads()),
    )
    return e


def refuses(t: Tensor, dim: int, *, dtype: torch.dtype | None = None, **_: object) -> str | None:
    """Why the kernel does not take these arguments, None when it does."""
    if t.dtype == torch.float64 or t.is_complex():
        return f"the cpp kernel takes integers, float32, bfloat16 and float16 times, got {t.dtype}"
    if dtype not in (None, *native.FLOATS):
        return f"the cpp kernel returns float32, bfloat16 or float16, not {dtype}"
    return native.refuses(t)
