"""The forward process in one pass: x_t from x0.

    x_t = alpha_t x0 + sigma_t eps,    v = alpha_t eps - sigma_t x0,    eps ~ N(0, I)

x0 as floats, or as uint8 pixels u read as u/127.5 - 1. Ho 2020, eq. 4; Salimans & Ho 2022 (v).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastdiff.ops import dispatch, native, philox


def _result_dtype(x0: Tensor) -> torch.dtype:
    return x0.dtype if x0.is_floating_point() else torch.float32


def q_sample_ref(
    x0: Tensor,
    t: Tensor,
    table: Tensor,
    *,
    noise: Tensor | None = None,
    seed: Tensor | None = None,
    index: Tensor | None = None,
    step: int = 0,
    stream: int = philox.Q_SAMPLE,
    eps: bool = False,
    v: bool = False,
) -> tuple[Tensor, ...]:
    """(x_t, eps if asked, v if asked) in plain PyTorch; arithmetic in fp32, in float64 for a float64 x0."""
    dtype = torch.promote_types(_result_dtype(x0), torch.float32)
    x = x0.to(dtype) if x0.is_floating_point() else x0.to(dtype) / 127.5 - 1
    if noise is None:
        assert seed is not None
        assert index is not None
        noise = philox.normal(seed, index, step, stream, x0.shape[1:], dtype)
    alpha, sigma = table.index_select(0, t).to(dtype).reshape(len(t), 2, *(1,) * (x.ndim - 1)).unbind(1)
    z = noise.to(dtype)
    parts = [alpha * x + sigma * z]
    parts += [z] * eps
    parts += [alpha * z - sigma * x] * v
    return tuple(p.to(_result_dtype(x0)) for p in parts)


def q_sample_cpp(
    x0: Tensor,
    t: Tensor,
    table: Tensor,
    *,
    noise: Tensor | None = None,
    seed: Tensor | None = None,
    index: Tensor | None = None,
    step: int = 0,
    stream: int = philox.Q_SAMPLE,
    eps: bool = False,
    v: bool = False,
) -> tuple[Tensor, ...]:
    """`q_sample_ref` by csrc/cpu/q_sample.cpp; results are contiguous."""
    x0, table = x0.contiguous(), native.dense(table, torch.float32)
    t = native.dense(t, torch.int64)
    seed, index = (None if a is None else native.dense(a, torch.int64) for a in (seed, index))
    if noise is not None:
        noise = native.dense(noise, noise.dtype if noise.dtype in native.FLOATS else torch.float32)
    dtype = _result_dtype(x0)
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
    return tuple(out for out in outs if out is not None)


def _cpp_refuses(
    x0: Tensor,
    t: Tensor,
    table: Tensor,
    *,
    noise: Tensor | None = None,
    seed: Tensor | None = None,
    index: Tensor | None = None,
    **_: object,
) -> str | None:
    if x0.dtype not in native.DTYPES:
        return f"the cpp kernel takes float32, bfloat16, float16 and uint8 images, got {x0.dtype}"
    return native.refuses(x0, t, table, noise, seed, index)


def q_sample(
    x0: Tensor,
    t: Tensor,
    table: Tensor,
    *,
    noise: Tensor | None = None,
    seed: Tensor | None = None,
    index: Tensor | None = None,
    step: int = 0,
    stream: int = philox.Q_SAMPLE,
    eps: bool = False,
    v: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    """x_t, or (x_t, eps), (x_t, v), (x_t, eps, v) as asked; the formula is at the head of this file.

    x0 (N, C, *spatial) fp32, bf16, fp16 or uint8; t (N,) int64, a line of `table` (T, 2) = [alpha, sigma]; noise shaped
    like x0, or None: then Philox noise of `seed` (1,), `index` (N,) int64, `step` and `stream`. Results in x0's dtype,
    fp32 for uint8. Raises ValueError where shapes do not fit or where neither noise nor seed and index are given.
    """
    if t.shape != (len(x0),) or table.ndim != 2 or table.shape[1] != 2:
        raise ValueError(
            f"q_sample: t must be ({len(x0)},) and table (T, 2), got {tuple(t.shape)} and {tuple(table.shape)}"
        )
    if noise is None and (seed is None or seed.shape != (1,) or index is None or index.shape != t.shape):
        raise ValueError("q_sample: pass noise shaped like x0, or seed (1,) and index (N,)")
    if noise is not None and noise.shape != x0.shape:
        raise ValueError(f"q_sample: noise must be shaped like x0 {tuple(x0.shape)}, got {tuple(noise.shape)}")
    run = dispatch.choose("q_sample", x0, t, table, noise=noise, seed=seed, index=index)
    parts: tuple[Tensor, ...] = run(
        x0, t, table, noise=noise, seed=seed, index=index, step=step, stream=stream, eps=eps, v=v
    )
    return parts if len(parts) > 1 else parts[0]


dispatch.register("q_sample", "reference", q_sample_ref)
dispatch.register("q_sample", "cpp", q_sample_cpp, missing=native.missing, refuses=_cpp_refuses)
