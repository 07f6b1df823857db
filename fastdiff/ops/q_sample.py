"""The forward process in one pass: x_t from x0.

    x_t = alpha_t x0 + sigma_t eps,    v = alpha_t eps - sigma_t x0,    eps ~ N(0, I)

x0 as floats, or as uint8 pixels u read as u/127.5 - 1. Where a mask `where` is False, x_t is x0 itself: known pixels,
conditioning frames. Ho 2020, eq. 4; Salimans & Ho 2022 (v).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastdiff.ops import cuda, dispatch, jit, library, philox


def result_dtype(x0: Tensor) -> torch.dtype:
    """Of x_t, eps and v."""
    return x0.dtype if x0.is_floating_point() else torch.float32


def q_sample_ref(
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
    """[x_t, eps if asked, v if asked] in plain PyTorch; arithmetic in fp32, in float64 for a float64 x0."""
    dtype = torch.promote_types(result_dtype(x0), torch.float32)
    x = x0.to(dtype) if x0.is_floating_point() else x0.to(dtype) / 127.5 - 1
    if noise is None:
        assert seed is not None
        assert index is not None
        noise = philox.normal(seed, index, step, stream, x0.shape[1:], dtype)
    alpha, sigma = table.index_select(0, t).to(dtype).reshape(len(t), 2, *(1,) * (x.ndim - 1)).unbind(1)
    z = noise.to(dtype)
    x_t = alpha * x + sigma * z
    parts = [x_t if where is None else torch.where(where, x_t, x)]
    parts += [z] * eps
    parts += [alpha * z - sigma * x] * v
    results = [p.to(result_dtype(x0)) for p in parts]
    return results if out is None else [out.copy_(results[0]), *results[1:]]


def _fake(x0: Tensor, *options: Any) -> list[Tensor]:
    *_, eps, v = options
    return [x0.new_empty(x0.shape, dtype=result_dtype(x0)) for _ in range(1 + eps + v)]


def _refuses(x0: Tensor, t: Tensor, table: Tensor, **_: object) -> str | None:
    """Kernels give the gradients of x0 and noise."""
    return "the kernels have no gradient of the schedule's table" if library.records_grad(table) else None


def _setup(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x0, t, table, noise, _, _, where, _, _, ctx.eps, ctx.v = inputs
    ctx.save_for_backward(t, table, where)
    ctx.dtypes = x0.dtype, None if noise is None else noise.dtype


def _backward(ctx: Any, grads: list[Tensor]) -> tuple[Tensor | None, ...]:
    """The transposed formula, in torch ops: linear, so that it differentiates again."""
    t, table, where = ctx.saved_tensors
    dtype = torch.promote_types(grads[0].dtype, torch.float32)
    g, *others = (grad.to(dtype) for grad in grads)
    alpha, sigma = table.index_select(0, t).to(dtype).reshape(len(t), 2, *(1,) * (g.ndim - 1)).unbind(1)
    kept = 0 if where is None else torch.where(where, 0.0, g)
    g = g if where is None else torch.where(where, g, 0.0)
    dx, dz = alpha * g + kept, sigma * g
    if ctx.eps:
        dz = dz + others[0]
    if ctx.v:
        dx, dz = dx - sigma * others[-1], dz + alpha * others[-1]
    x_dtype, z_dtype = ctx.dtypes
    dx = dx.to(x_dtype) if x_dtype.is_floating_point else None
    return (dx, None, None, None if z_dtype is None else dz.to(z_dtype), *(None,) * 7)


def q_sample(
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
) -> Tensor | tuple[Tensor, ...]:
    """x_t, or (x_t, eps), (x_t, v), (x_t, eps, v) as asked; the formula is at the head of this file.

    x0 (N, C, *spatial) fp32, bf16, fp16 or uint8; t (N,) int64, a line of `table` (T, 2) = [alpha, sigma]; noise shaped
    like x0, or None: then Philox noise of `seed` (1,), `index` (N,) int64, `step` and `stream`. where: a mask that
    broadcasts to x0, x_t is x0 where it is False; eps and v are given everywhere. Results in x0's dtype, fp32 for
    uint8; x_t is written into `out`, dense, where given (not differentiable). Differentiable in x0 and noise. Raises
    ValueError where shapes do not fit or where neither noise nor seed and index are given.
    """
    given = {"noise": noise, "seed": seed, "index": index, "where": where}
    _check(x0, t, table, **given, out=out)
    options = {**given, "step": step, "stream": stream, "eps": eps, "v": v}
    if out is None:
        parts = library.call("q_sample", x0, t, table, **options)
    elif torch.compiler.is_compiling():
        x_t, *others = library.call("q_sample", x0, t, table, **options)
        parts = [out.copy_(x_t), *others]
    else:
        parts = dispatch.choose("q_sample", x0, t, table, **options, out=out)(x0, t, table, **options, out=out)
    return tuple(parts) if len(parts) > 1 else parts[0]


def _check(
    x0: Tensor,
    t: Tensor,
    table: Tensor,
    *,
    noise: Tensor | None,
    seed: Tensor | None,
    index: Tensor | None,
    where: Tensor | None,
    out: Tensor | None,
) -> None:
    if t.shape != (len(x0),) or table.ndim != 2 or table.shape[1] != 2:
        raise ValueError(
            f"q_sample: t must be ({len(x0)},) and table (T, 2), got {tuple(t.shape)} and {tuple(table.shape)}"
        )
    if noise is None and (seed is None or seed.shape != (1,) or index is None or index.shape != t.shape):
        raise ValueError("q_sample: pass noise shaped like x0, or seed (1,) and index (N,)")
    if noise is not None and noise.shape != x0.shape:
        raise ValueError(f"q_sample: noise must be shaped like x0 {tuple(x0.shape)}, got {tuple(noise.shape)}")
    if where is not None and (
        where.dtype != torch.bool
        or where.ndim != x0.ndim
        or any(a != 1 and a != b for a, b in zip(where.shape, x0.shape, strict=True))  # noqa: PLR1714  traced sizes
    ):
        raise ValueError(
            f"q_sample: where must be a bool mask with {x0.ndim} axes that broadcasts to x0 {tuple(x0.shape)}, got "
            f"{where.dtype} {tuple(where.shape)}"
        )
    if out is not None and (out.shape != x0.shape or out.dtype != result_dtype(x0) or not out.is_contiguous()):
        raise ValueError(
            f"q_sample: out must be dense {result_dtype(x0)} {tuple(x0.shape)}, got {out.dtype} {tuple(out.shape)} "
            f"with strides {out.stride()}"
        )
    follows = torch.is_grad_enabled() and (x0.requires_grad or (noise is not None and noise.requires_grad))
    if out is not None and follows:
        raise ValueError("q_sample: out cannot receive a result that requires grad; leave out=None, or use no_grad")


library.describe(
    "q_sample",
    "(Tensor x0, Tensor t, Tensor table, Tensor? noise, Tensor? seed, Tensor? index, "
    "Tensor? where, int step, int stream, bool eps, bool v) -> Tensor[]",
    _fake,
    setup=_setup,
    backward=_backward,
    refuses=_refuses,
)
dispatch.register("q_sample", "reference", q_sample_ref)
library.kernel("q_sample", "cpp")
library.kernel("q_sample", "triton", by_name=jit.UNPROVEN)
library.kernel("q_sample", "cuda", by_name=cuda.COMPILED_ONLY)
