"""Counter-based Gaussian noise, Philox4x32-10 and Box-Muller: the plain-PyTorch reference of every kernel that draws.

    key      = the run's 64-bit seed
    counter  = (i // 4, step | stream << 24, index_lo, index_hi)
    u        = float(word) 2^-32 + 2^-33                         fp32, round to nearest: bit-equal on every backend
    n0, n1   = r cos(2 pi u1), r sin(2 pi u1),  r = sqrt(max(0, -2 ln u0))      words (0, 1); n2, n3 from words (2, 3)

i is the row-major position inside one image of the logical shape (C, *spatial), `index` the image's number in the run.
So an image's noise does not depend on batch, order, process count, layout or device. Salmon 2011 (Philox).
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence

import torch
from torch import Tensor

X_T, STEP, Q_SAMPLE, RENOISE, TIME, DEQUANTISE, PROBE, DROP, ORDER, FLIP = range(10)
"""The streams; 128..255 are the user's."""

_M0, _M1 = 0xD2511F53, 0xCD9E8D57  # multipliers and key increments of Philox4x32
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_LOW = 0xFFFFFFFF


def seed_tensor(seed: int | Tensor, device: torch.device | str = "cpu") -> Tensor:
    """A 64-bit seed, signed or unsigned, as the (1,) int64 tensor that ops take."""
    if isinstance(seed, Tensor):
        return seed.reshape(1).to(device=device, dtype=torch.int64)
    number = operator.index(seed) if hasattr(seed, "__index__") else None
    if number is None or not -(2**63) <= number < 2**64:
        raise ValueError(f"seed={seed} is no integer of 64 bits; pass one from -2**63 to 2**64 - 1")
    return torch.tensor([number - 2**64 if number >= 2**63 else number], dtype=torch.int64, device=device)


def words(seed: Tensor, index: Tensor, step: Tensor | int, stream: int, blocks: int) -> tuple[Tensor, ...]:
    """Four (N, blocks) int64 tensors of 32-bit words, one Philox block for each four positions of each image."""
    c0 = torch.arange(blocks, device=index.device).expand(len(index), blocks)
    c1 = torch.zeros_like(c0) + (step | (stream << 24))
    c2, c3 = (part[:, None].expand_as(c0) for part in (index & _LOW, (index >> 32) & _LOW))
    k0, k1 = seed & _LOW, (seed >> 32) & _LOW
    for _ in range(10):
        # int64 products wrap modulo 2^64, which leaves all 64 bits of a 32 x 32 product right
        p0, p1 = c0 * _M0, c2 * _M1
        c0, c1, c2, c3 = ((p1 >> 32) & _LOW) ^ c1 ^ k0, p1 & _LOW, ((p0 >> 32) & _LOW) ^ c3 ^ k1, p0 & _LOW
        k0, k1 = (k0 + _W0) & _LOW, (k1 + _W1) & _LOW
    return c0, c1, c2, c3


def _unit(word: Tensor, dtype: torch.dtype) -> Tensor:
    return (word.to(torch.float32) * 2**-32 + 2**-33).to(dtype)


def _box_muller(u0: Tensor, u1: Tensor) -> tuple[Tensor, Tensor]:
    r = (-2 * u0.log()).clamp_min(0).sqrt()
    # u1 = quarter / 4 + rest, exactly: the angle stays within pi / 4 and keeps its last bits
    quarter = (4 * u1).round()
    angle = (u1 - quarter / 4) * (2 * math.pi)
    c, s, odd = r * angle.cos(), r * angle.sin(), quarter.remainder(2) == 1
    flip = torch.where((quarter == 2) | (quarter == 3), -1.0, 1.0).to(c.dtype)
    return flip * torch.where(odd, -s, c), flip * torch.where(odd, c, s)


def _fill(parts: tuple[Tensor, ...], n: int, shape: Sequence[int]) -> Tensor:
    return torch.stack(parts, 2).flatten(1)[:, : math.prod(shape)].reshape(n, *shape)


def uniform(
    seed: Tensor,
    index: Tensor,
    step: Tensor | int,
    stream: int,
    shape: Sequence[int],
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Uniform numbers u in (0, 1], (N, *shape), fp32 values whatever the dtype.

    seed (1,) int64; index (N,) int64, the images' numbers; step a row's number (< 2^24), int or (1,) int64.
    """
    w = words(seed, index, step, stream, -(-math.prod(shape) // 4))
    return _fill(tuple(_unit(word, dtype) for word in w), len(index), shape)


def normal(
    seed: Tensor,
    index: Tensor,
    step: Tensor | int,
    stream: int,
    shape: Sequence[int],
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Standard normals z (N, *shape), see the head of this file; in float64 the same u go through float64 functions.

    seed (1,) int64; index (N,) int64, the images' numbers; step a row's number (< 2^24), int or (1,) int64.
    """
    u = [_unit(word, dtype) for word in words(seed, index, step, stream, -(-math.prod(shape) // 4))]
    return _fill((*_box_muller(u[0], u[1]), *_box_muller(u[2], u[3])), len(index), shape)
