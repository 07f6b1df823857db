"""Sinusoidal features of a time, as DDPM, guided-diffusion and diffusers define them.

    f_j = max_period^(-j / (dim/2 - shift)),  j = 0 .. dim/2 - 1
    e   = [sin(t f), cos(t f)],  or [cos(t f), sin(t f)] with flip=True; a zero behind them when dim is odd

DDPM (Ho 2020) is shift=1, flip=False; guided-diffusion (Dhariwal & Nichol 2021) is shift=0, flip=True;
diffusers names the same two numbers freq_shift and flip_sin_to_cos.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from fastdiff.ops import dispatch


def time_embed_ref(
    t: Tensor, dim: int, *, max_period: float = 10000.0, flip: bool = False, shift: float = 0.0
) -> Tensor:
    """The formula above in plain PyTorch: t (N,) to (N, dim), float64 when t is, else float32."""
    half = dim // 2
    wide = torch.float64 if t.dtype == torch.float64 else torch.float32
    j = torch.arange(half, dtype=wide, device=t.device)
    angle = t.to(wide)[:, None] * torch.exp(-math.log(max_period) * j / (half - shift))
    parts = [angle.cos(), angle.sin()] if flip else [angle.sin(), angle.cos()]
    return functional.pad(torch.cat(parts, 1), (0, dim % 2))


def time_embed(t: Tensor, dim: int, *, max_period: float = 10000.0, flip: bool = False, shift: float = 0.0) -> Tensor:
    """Sinusoidal features (N, dim) of the times t (N,), see the head of this file.

    t is an integer step or any real time. Raises ValueError where dim/2 - shift is not positive.
    """
    if dim // 2 - shift <= 0:
        raise ValueError(f"time_embed: dim={dim} with shift={shift} has no frequency; pass dim > {2 * shift + 1}")
    e: Tensor = dispatch.choose("time_embed", t, dim)(t, dim, max_period=max_period, flip=flip, shift=shift)
    return e


dispatch.register("time_embed", "reference", time_embed_ref)
