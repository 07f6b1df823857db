"""Sinusoidal features of a time, as DDPM, guided-diffusion and diffusers define them.

    f_j = max_period^(-j / (dim/2 - shift)),  j = 0 .. dim/2 - 1
    e   = [sin(s t f), cos(s t f)],  or [cos(s t f), sin(s t f)] with flip=True; a zero behind them when dim is odd

DDPM (Ho 2020) is shift=1, flip=False; guided-diffusion (Dhariwal & Nichol 2021) is shift=0, flip=True;
diffusers names the same two numbers freq_shift and flip_sin_to_cos. s is `scale`: 1000 for times in 0..1.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fastdiff.ops import dispatch, jit, library


def time_embed_ref(
    t: Tensor,
    dim: int,
    *,
    max_period: float = 10000.0,
    flip: bool = False,
    shift: float = 0.0,
    scale: float = 1.0,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The formula above in plain PyTorch: t (N,) to (N, dim); arithmetic in float64 when t is, else in float32."""
    half = dim // 2
    wide = torch.float64 if t.dtype == torch.float64 else torch.float32
    j = torch.arange(half, dtype=wide, device=t.device)
    angle = (scale * t.to(wide))[:, None] * torch.exp(-math.log(max_period) * j / (half - shift))
    parts = [angle.cos(), angle.sin()] if flip else [angle.sin(), angle.cos()]
    return functional.pad(torch.cat(parts, 1), (0, dim % 2)).to(dtype or wide)


def _fake(t: Tensor, dim: int, *options: Any) -> Tensor:
    return t.new_empty((t.shape[0], dim), dtype=options[-1] or torch.float32)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    t, *ctx.options = inputs
    ctx.save_for_backward(t)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """N * dim numbers: the reference's own gradient, which differentiates again."""
    (t,) = ctx.saved_tensors
    dim, max_period, flip, shift, scale, dtype = ctx.options
    given = {"max_period": max_period, "flip": flip, "shift": shift, "scale": scale, "dtype": dtype}
    return (*library.grads_of(lambda t: time_embed_ref(t, dim, **given), (t,), grad), *(None,) * 6)


def time_embed(
    t: Tensor,
    dim: int,
    *,
    max_period: float = 10000.0,
    flip: bool = False,
    shift: float = 0.0,
    scale: float = 1.0,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Sinusoidal features (N, dim) of the times scale * t, t (N,), see the head of this file.

    t is an integer step or any real time. dtype: of the result, computed in fp32 (float64 where t is) and rounded once:
    what the first layer of the embedding's MLP takes; None is fp32, float64 where t is. Twice differentiable in t.
    Raises ValueError where dim/2 - shift is not positive.
    """
    if dim // 2 - shift <= 0:
        raise ValueError(f"time_embed: dim={dim} with shift={shift} has no frequency; pass dim > {2 * shift + 1}")
    if t.ndim != 1:
        raise ValueError(f"time_embed: t must be (N,), got {tuple(t.shape)}; pass t.reshape(-1)")
    given = {"max_period": max_period, "flip": flip, "shift": shift, "scale": scale, "dtype": dtype}
    e: Tensor = library.call("time_embed", t, dim, **given)
    return e


library.describe(
    "time_embed",
    "(Tensor t, int dim, float max_period, bool flip, float shift, float scale, ScalarType? dtype) -> Tensor",
    _fake,
    setup=_setup,
    backward=_backward,
)
dispatch.register("time_embed", "reference", time_embed_ref)
library.kernel("time_embed", "cpp")
library.kernel("time_embed", "triton", by_name=jit.UNPROVEN)
