"""Every op written out in float64. Shares no code with references or kernels: the noise is NumPy's, sums are plain."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastdiff import row

_M = (0xD2511F53, 0xCD9E8D57)
_W = (0x9E3779B9, 0xBB67AE85)


def _words(seed: int, block: np.ndarray, step: int, stream: int, index: int) -> list[np.ndarray]:
    """Philox4x32-10 (Salmon 2011) of the counters (block, step | stream << 24, index_lo, index_hi)."""
    low = np.uint64(0xFFFFFFFF)
    fixed = (step | stream << 24, index & 0xFFFFFFFF, index >> 32 & 0xFFFFFFFF)
    c = [block.astype(np.uint64), *(np.full(block.shape, v, np.uint64) for v in fixed)]
    key = [seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF]
    for _ in range(10):
        p, q = c[0] * np.uint64(_M[0]), c[2] * np.uint64(_M[1])
        first, third = q >> np.uint64(32) ^ c[1], p >> np.uint64(32) ^ c[3]
        c = [first ^ np.uint64(key[0]), q & low, third ^ np.uint64(key[1]), p & low]
        key = [(k + w) & 0xFFFFFFFF for k, w in zip(key, _W, strict=True)]
    return c


def uniform(seed: Tensor, index: Tensor, step: int, stream: int, size: int) -> np.ndarray:
    """u = float(word) 2^-32 + 2^-33 in fp32, (N, size)."""
    block = np.arange(-(-size // 4))
    rows = [np.stack(_words(int(seed) % 2**64, block, step, stream, n), 1).ravel()[:size] for n in index.tolist()]
    words = np.array(rows, np.uint64).reshape(len(index), size)
    return words.astype(np.float32) * np.float32(2**-32) + np.float32(2**-33)


def normal(seed: Tensor, index: Tensor, step: int, stream: int, shape: tuple[int, ...]) -> Tensor:
    """(N, *shape): r (cos, sin)(2 pi u1) with r = sqrt(-2 ln u0), pair by pair."""
    size = math.prod(shape)
    u = uniform(seed, index, step, stream, size + size % 2).astype(np.float64)
    r, angle = np.sqrt(-2 * np.log(u[:, ::2])), 2 * math.pi * u[:, 1::2]
    z = np.stack([r * np.cos(angle), r * np.sin(angle)], 2).reshape(len(index), size + size % 2)
    return torch.from_numpy(z[:, :size].reshape(len(index), *shape).copy())


def pixels(x: Tensor) -> Tensor:
    """Images in [-1, 1]: uint8 u is u / 127.5 - 1."""
    return x.double() / 127.5 - 1 if x.dtype == torch.uint8 else x.double()


def _lead(v: Tensor, x: Tensor) -> Tensor:
    """(N,) to (N, 1, ...) like x."""
    return v.reshape(-1, *(1,) * (x.ndim - 1))


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
    stream: int = 2,
) -> dict[str, Tensor]:
    """x_t = alpha x0 + sigma eps where the mask is set and x0 elsewhere; eps; v = alpha eps - sigma x0."""
    x = pixels(x0)
    z = normal(seed, index, step, stream, x.shape[1:]) if noise is None else noise.double()
    alpha, sigma = (_lead(table.double()[t.long(), i], x) for i in (0, 1))
    x_t = alpha * x + sigma * z
    return {"x_t": x_t if where is None else torch.where(where, x_t, x), "eps": z, "v": alpha * z - sigma * x}


def step(args: dict[str, Any]) -> dict[str, Tensor]:
    """x, x_in, h and bad behind row k, by the formula of the design; `args` are step_'s, none is changed."""
    k = int(args["k"])
    r, after = ({name: float(v) for name, v in zip(row.NAMES, line, strict=True)} for line in args["rows"][k : k + 2])
    x, h, F, x_in = (None if args[name] is None else args[name].double() for name in ("x", "h", "F", "x_in"))
    n, channels = x.shape[:2]
    c, second = F[:n, :channels], F[:n, channels : 2 * channels]
    prediction = c if len(F) == n or r["W"] == 1 else F[n:, :channels] + r["W"] * (c - F[n:, :channels])

    def term(coefficient: float, operand: Tensor) -> Tensor | float:
        return coefficient * operand if coefficient != 0 else 0.0

    raw = torch.zeros_like(x) + term(r["C_SKIP"], x) + term(r["C_OUT"], prediction)
    # comparisons with NaN are false: NaN passes
    x0 = torch.where(raw > r["CLIP"], r["CLIP"], torch.where(raw < -r["CLIP"], -r["CLIP"], raw))
    y = torch.zeros_like(x) + term(r["A"], x) + term(r["B0"], x0) + term(r["BF"], prediction)
    for slot in range(3):
        y = y + term(r[f"B{slot + 1}"], h[slot])
    if r["S"] != 0:
        z = normal(args["seed"], args["index"], k, 1, x.shape[1:]) if args["noise"] is None else args["noise"].double()
        s2 = torch.ones_like(x)
        if args["variance"] == "range":
            s2 = torch.exp(r["V0"] + (second + 1) / 2 * (r["V1"] - r["V0"]))
        if args["variance"] == "moment":
            eps = (x - r["ALPHA"] * raw) / r["SIGMA"]
            s2 = r["V0"] + r["V1"] * second + r["V2"] * eps**2
            s2 = torch.where(s2 < r["V0"], r["V0"], s2)
            s2 = torch.where(s2 > r["V3"], r["V3"], s2)
        y = y + r["S"] * torch.sqrt(s2) * z
    if r["P"] != 0 or r["Q"] != 0:
        h = h.clone()
        h[int(r["SLOT"])] = torch.zeros_like(x) + term(r["P"], x) + term(r["Q"], x0)
    if x_in is not None:
        x_in = x_in.clone()
        for half in range(len(x_in) // n if n else 0):
            x_in[half * n : (half + 1) * n, :channels] = after["C_IN"] * y
    bad = args["bad"]
    if bad is not None:
        broken = ~y.flatten(1).isfinite().all(1)
        bad = torch.where(broken & (bad < 0), k, bad)
    return {name: v for name, v in {"x": y, "x_in": x_in, "h": h, "bad": bad}.items() if v is not None}


def _channels(v: Tensor | None, x: Tensor, default: float) -> Tensor:
    """(C,), (N, C) or None as (N or 1, C, 1, ...)."""
    if v is None:
        return torch.full((1, x.shape[1], *(1,) * (x.ndim - 2)), default, dtype=torch.float64)
    v = v.double()
    return (v if v.ndim == 2 else v[None]).reshape(-1, x.shape[1], *(1,) * (x.ndim - 2))


def _silu(n: Tensor) -> Tensor:
    return n * torch.sigmoid(n)


def group_norm_silu(
    x: Tensor,
    groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    eps: float = 1e-5,
    x2: Tensor | None = None,
    add: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    act: bool = True,
) -> Tensor:
    """silu(((z - mean) / sqrt(var + eps) weight + bias) (1 + scale) + shift) of z = [x, x2] + add, group by group."""
    z = x.double() if x2 is None else torch.cat([x.double(), x2.double()], 1)
    z = z + _channels(add, z, 0.0)
    wide = z.shape[1] // groups
    parts = []
    for g in range(groups):
        part = z[:, g * wide : (g + 1) * wide]
        axes, count = tuple(range(1, z.ndim)), max(part[:1].numel(), 1)
        centred = part - part.sum(axes, keepdim=True) / count
        parts.append(centred / ((centred**2).sum(axes, keepdim=True) / count + eps).sqrt())
    n = torch.cat(parts, 1) * _channels(weight, z, 1.0) + _channels(bias, z, 0.0)
    n = n * (1 + _channels(scale, z, 0.0)) + _channels(shift, z, 0.0)
    return _silu(n) if act else n


def inject(
    x: Tensor,
    *,
    add: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    act: bool = False,
) -> Tensor:
    """silu or nothing of (x + add)(1 + scale) + shift, then the residual."""
    y = (x.double() + _channels(add, x, 0.0)) * (1 + _channels(scale, x, 0.0)) + _channels(shift, x, 0.0)
    y = _silu(y) if act else y
    return y if residual is None else y + residual.double()


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
    """sin and cos of scale t max_period^(-j / (dim/2 - shift)), cosines first with flip, a zero behind odd dims."""
    e = torch.zeros(len(t), dim, dtype=torch.float64)
    half = dim // 2
    for j in range(half):
        angle = scale * t.double() * max_period ** (-j / (half - shift))
        first, second = (torch.cos, torch.sin) if flip else (torch.sin, torch.cos)
        e[:, j], e[:, half + j] = first(angle), second(angle)
    return e


def conv_input(
    x: Tensor,
    *,
    x2: Tensor | None = None,
    groups: int = 0,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-5,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    act: bool = True,
    upsample: bool = False,
) -> Tensor:
    """What norm_silu_conv convolves."""
    if groups:
        given = {"eps": eps, "x2": x2, "scale": scale, "shift": shift, "act": act}
        h = group_norm_silu(x, groups, norm_weight, norm_bias, **given)  # type: ignore[arg-type]
    else:
        h = x.double() if x2 is None else torch.cat([x.double(), x2.double()], 1)
    if not upsample:
        return h
    rows, columns = (torch.arange(2 * s) // 2 for s in h.shape[2:])
    return h[:, :, rows][:, :, :, columns]


def conv(h: Tensor, weight: Tensor, stride: int = 1, asymmetric: bool = False) -> Tensor:
    """A sum over the taps of the window: every tap is a product of the pixels that it meets, cut out of zeros."""
    size, (height, width) = weight.shape[2], h.shape[2:]
    front, back = (0, size // 2) if asymmetric else (size // 2, size // 2)
    around = h.new_zeros(*h.shape[:2], front + height + back, front + width + back)
    around[:, :, front : front + height, front : front + width] = h
    down, across = ((around.shape[axis] - size) // stride + 1 for axis in (2, 3))
    y = h.new_zeros(len(h), len(weight), down, across)
    for i in range(size):
        for j in range(size):
            met = around[:, :, i : i + stride * down : stride, j : j + stride * across : stride]
            y = y + torch.einsum("oc,nchw->nohw", weight[:, :, i, j].double(), met)
    return y


def norm_silu_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    add: Tensor | None = None,
    residual: Tensor | None = None,
    stride: int = 1,
    asymmetric: bool = False,
    append: bool = False,
    **given: Any,
) -> Tensor:
    """conv(h = silu(norm([x, x2]))) + bias + add + residual, and h behind it where append."""
    h = conv_input(x, **given)
    y = conv(h, weight, stride, asymmetric)
    y = y + _channels(bias, y, 0.0) + _channels(add, y, 0.0)
    y = y if residual is None else y + residual.double()
    return torch.cat([y, h], 1) if append else y


def attention(qkv: Tensor, heads: int) -> Tensor:
    """`attended` of the three parts of qkv."""
    q, k, v = qkv.chunk(3, 2)
    return attended(q, k, v, heads)


def attended(q: Tensor, k: Tensor, v: Tensor, heads: int, residual: Tensor | None = None) -> Tensor:
    """softmax(q k' / sqrt(d)) v, head by head, + residual."""
    q, k, v = q.double(), k.double(), v.double()
    depth, found = q.shape[2] // heads, []
    for head in range(heads):
        own = slice(head * depth, (head + 1) * depth)
        scores = q[..., own] @ k[..., own].mT / math.sqrt(depth)
        powers = torch.exp(scores - scores.amax(2, keepdim=True))
        found.append(powers / powers.sum(2, keepdim=True) @ v[..., own])
    y = torch.cat(found, 2)
    return y if residual is None else y + residual.double()


def layer_norm(x: Tensor, norm: bool, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """(x - mean) / sqrt(var + eps) weight + bias of each token, or x."""
    x = x.double()
    if not norm:
        return x
    centred = x - x.sum(2, keepdim=True) / x.shape[2]
    h = centred / ((centred**2).sum(2, keepdim=True) / x.shape[2] + eps).sqrt()
    h = h if weight is None else h * weight.double()
    return h if bias is None else h + bias.double()


def norm_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    norm: bool = False,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-5,
    gate: bool = False,
    residual: Tensor | None = None,
) -> Tensor:
    """h W' + bias of h = norm(x), or the first half of that times g Phi(g) of the second, + residual."""
    y = torch.einsum("nlc,oc->nlo", layer_norm(x, norm, norm_weight, norm_bias, eps), weight.double())
    y = y if bias is None else y + bias.double()
    if gate:
        half = len(weight) // 2
        a, g = y[..., :half], y[..., half:]
        y = a * g * (0.5 * torch.special.erfc(-g / math.sqrt(2)))
    return y if residual is None else y + residual.double()
