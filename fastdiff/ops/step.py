"""The reverse step of every solver: one row of numbers (`fastdiff.row`) applied to the state.

    F   = F_u + W (F_c - F_u)
    x0  = clip(C_SKIP x + C_OUT F, CLIP)
    x'  = A x + B0 x0 + BF F + B1 h1 + B2 h2 + B3 h3 + S sqrt(s2) z
    h[SLOT] = P x + Q x0,    x_in = C_IN(next row) x'

    s2  = 1                                             variance None
    ln s2 = V0 + (v + 1)/2 (V1 - V0)                    "range": v from the network, Nichol & Dhariwal 2021, eq. 15
    s2  = min(max(V0 + V1 g + V2 eps^2, V0), V3)        "moment": g from a second head, Bao 2022 (SN-, NPR-DPM)

A coefficient of zero means that its operand is not read, so a NaN behind it does no harm.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastdiff import row
from fastdiff.ops import cuda, dispatch, jit, library, philox

VARIANCES = (None, "range", "moment")


def _term(coefficient: Tensor, operand: Tensor) -> Tensor:
    return torch.where(coefficient != 0, coefficient * operand, 0.0)


def guided_ref(F: Tensor, r: Tensor, n: int) -> Tensor:
    """F_u + W (F_c - F_u) of F = [F_c, F_u]; F itself when it holds n images only."""
    if len(F) == n:
        return F
    c, u = F[:n], F[n:]
    return torch.where(r[row.W] == 1, c, u + r[row.W] * (c - u))


def x0_ref(x: Tensor, F: Tensor, r: Tensor) -> Tensor:
    """The image that the network's output F (N or 2N, >= C, *spatial) stands for, before clipping."""
    return _term(r[row.C_SKIP], x) + _term(r[row.C_OUT], guided_ref(F[:, : x.shape[1]].to(x.dtype), r, len(x)))


def variance_ref(x: Tensor, x0: Tensor, second: Tensor, r: Tensor, kind: str) -> Tensor:
    """s2 of the two kinds above; x0 before clipping."""
    v0, v1, v2, v3 = r[row.V0], r[row.V1], r[row.V2], r[row.V3]
    if kind == "range":
        return (v0 + (second + 1) / 2 * (v1 - v0)).exp()
    eps = (x - r[row.ALPHA] * x0) / r[row.SIGMA]
    return torch.minimum(torch.maximum(v0 + v1 * second + v2 * eps**2, v0), v3)


def step_ref(
    x: Tensor, F: Tensor, h: Tensor, r: Tensor, z: Tensor | None, variance: str | None = None
) -> tuple[Tensor, Tensor]:
    """(x', P x + Q x0) of one row r (columns,) in the dtype of x; z None where the row draws no noise."""
    n, channels = x.shape[:2]
    raw = x0_ref(x, F, r)
    x0 = raw.clamp(-r[row.CLIP], r[row.CLIP])
    y = _term(r[row.A], x) + _term(r[row.B0], x0)
    y = y + _term(r[row.BF], guided_ref(F[:, :channels].to(x.dtype), r, n))
    for slot, b in enumerate((row.B1, row.B2, row.B3)):
        y = y + _term(r[b], h[slot])
    if z is not None:
        if variance is not None:
            second = F[:n, channels : 2 * channels].to(x.dtype)
            z = variance_ref(x, raw, second, r, variance).sqrt() * z
        y = y + _term(r[row.S], z)
    return y, _term(r[row.P], x) + _term(r[row.Q], x0)


def _may_draw(r: Tensor) -> bool:
    """False where the row certainly draws no noise; a device is never asked."""
    return r.device.type != "cpu" or torch.compiler.is_compiling() or bool(r[row.S] != 0)


def step_reference_(
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
    """`step_` in plain PyTorch, in the dtype of x: whole loops also run in float64."""
    r, after = rows.index_select(0, k)[0], rows.index_select(0, k + 1)[0]
    if noise is None and _may_draw(r):
        noise = philox.normal(seed, index, k, philox.STEP, x.shape[1:], x.dtype)
    y, kept = step_ref(x, F, h, r, noise, variance)
    slot = r[row.SLOT].to(torch.int64).reshape(1)
    remembers = (r[row.P] != 0) | (r[row.Q] != 0)
    h.index_copy_(0, slot, torch.where(remembers, kept, h.index_select(0, slot)[0])[None])
    if bad is not None:
        broken = ~y.isfinite().flatten(1).all(1)
        bad.copy_(torch.where(broken & (bad < 0), k, bad))
    x.copy_(y)
    if x_in is not None:
        for half in x_in.tensor_split(2 if len(x_in) > len(x) else 1):
            half[:, : x.shape[1]].copy_(after[row.C_IN] * y)


def check(
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
    """Raise ValueError where the arguments of a step do not fit; kernels rely on it."""
    n, channels, *space = x.shape
    wanted = 2 * channels if variance else channels
    if variance not in VARIANCES:
        raise ValueError(f"step_: variance={variance!r} is unknown; accepted: {', '.join(map(repr, VARIANCES))}")
    if not x.is_contiguous() or h.shape != (row.SLOTS, *x.shape) or not h.is_contiguous():
        raise ValueError(
            f"step_: the state must be dense NCHW with h (3, *x.shape), got x {tuple(x.shape)} with strides "
            f"{x.stride()} and h {tuple(h.shape)}; allocate both with torch.zeros"
        )
    if F.shape[0] not in (n, 2 * n) or F.shape[1] < wanted or list(F.shape[2:]) != space:
        raise ValueError(
            f"step_: the network returned {tuple(F.shape)} for a state {tuple(x.shape)}; accepted: {n} or {2 * n} "
            f"images, {wanted} channels, the same size; check `predicts` and the network's output channels"
        )
    if x_in is not None and (
        x_in.shape[0] not in (n, 2 * n) or x_in.shape[1] < channels or list(x_in.shape[2:]) != space
    ):
        raise ValueError(
            f"step_: x_in {tuple(x_in.shape)} does not fit the state {tuple(x.shape)}; accepted: {n} or {2 * n} "
            f"images, at least {channels} channels, the same size"
        )
    if rows.ndim != 2 or rows.shape[1] != row.COLUMNS:
        raise ValueError(f"step_: rows must be (lines, {row.COLUMNS}), got {tuple(rows.shape)}; see fastdiff.plan")
    for name, a, shape in (
        *(("k", k, (1,)), ("seed", seed, (1,)), ("index", index, (n,))),
        *(("noise", noise, x.shape), ("bad", bad, (n,))),
    ):
        if a is not None and a.shape != shape:
            raise ValueError(f"step_: {name} must be {tuple(shape)} for a state {tuple(x.shape)}, got {tuple(a.shape)}")
    for name, a in (("F", F), ("x_in", x_in), ("h", h), ("rows", rows), ("k", k), ("noise", noise), ("bad", bad)):
        if a is not None and a.device != x.device:
            raise ValueError(
                f"step_: {name} is on {a.device} and the state on {x.device}; for a network that is a plain function "
                "pass fd.Denoiser(..., device=...)"
            )


def _fake(*_: object) -> None:
    """It returns nothing."""


def _refuses(*args: Tensor | None, noise: Tensor | None = None, **_: object) -> str | None:
    """Kernels write the state in place and record no gradient."""
    if library.records_grad(*args, noise):
        return "an argument requires grad and the kernel records none; call it under torch.no_grad()"
    return None


def step_(
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
    """Apply row k of `rows` to the state, in place; the formula is at the head of this file.

    x (N, C, *spatial) dense, fp32 (the reference takes any float dtype, rows and h alike); x_in (N or 2N, >= C,
    *spatial), the network's next input in its dtype, or None; h (3, *x.shape); F (N or 2N, C or 2C, *spatial) by
    stride, 2N being [conditional, unconditional]; rows (lines, fastdiff.row.COLUMNS); k, seed (1,) int64; index (N,)
    int64, the images' numbers. variance: None, "range" or "moment", read from the second C channels of the conditional
    half. noise: z of this row, shaped like x, instead of Philox stream 1. bad (N,) int64 receives k where x' is not
    finite and bad was negative. Raises ValueError on shapes that do not fit. Derivation: docs/math.md.
    """
    args = (x, x_in, h, F, rows, k, index, seed)
    check(*args, variance=variance, noise=noise, bad=bad)
    library.call("step_", *args, variance=variance, noise=noise, bad=bad)


library.describe(
    "step_",
    "(Tensor(a!) x, Tensor(b!)? x_in, Tensor(c!) h, Tensor F, Tensor rows, Tensor k, Tensor index, Tensor seed, "
    "str? variance, Tensor? noise, Tensor(d!)? bad) -> ()",
    _fake,
    mutates=("x", "x_in", "h", "bad"),
    refuses=_refuses,
)
dispatch.register("step_", "reference", step_reference_)
library.kernel("step_", "cpp")
library.kernel("step_", "triton", by_name=jit.UNPROVEN)
library.kernel("step_", "cuda", by_name=cuda.COMPILED_ONLY)
