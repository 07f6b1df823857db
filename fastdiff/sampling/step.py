"""The one step that every solver repeats.

F = net(x_in, t, cond);   step_(x, x_in, h, F, rows, k, index, seed);   k += 1

With energies E_i of weight w_i the score is that of p(x_t) exp(-sum w_i E_i), and so, since x0 = C_SKIP x + C_OUT F and
score = (alpha x0 - x) / sigma^2:

F' = F - sigma^2 / (alpha C_OUT) grad_x sum w_i E_i
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastdiff import row
from fastdiff.nn.layers import Deep
from fastdiff.ops.group_norm_silu import layout
from fastdiff.ops.keep import keep_
from fastdiff.ops.step import check, x0_ref
from fastdiff.sampling.guidance import Cond, map_cond
from fastdiff.sampling.state import Kind, Program, State


def one_step(program: Program, s: State, kind: Kind, noise: Tensor | None = None) -> None:
    """One network call and one row: all that a run repeats, with no host decision in it.

    noise: z of the row instead of Philox. A watched row leaves its clipped x0 in s.x0.
    """
    F = _steered(program, s, kind) if kind.steered else _network(program, s, s.x_in[: kind.images], kind.fresh)
    if kind.watched:
        assert s.x0 is not None
        r = s.rows.index_select(0, s.k)[0]
        # not copy_: a compiler may move it behind step_, which changes x
        keep_(s.x0, x0_ref(s.x, F, r).clamp(-r[row.CLIP], r[row.CLIP]))
    args = (s.x, s.x_in, s.h, F, s.rows, s.k, s.number, s.seed)
    check(*args, variance=program.variance, noise=noise, bad=s.bad)
    program.step_(*args, variance=program.variance, noise=noise, bad=s.bad)
    s.k.add_(1)


def _first(cond: Cond, images: int) -> Cond:
    return map_cond(lambda c: c[:images], cond)


def _network(program: Program, s: State, x_in: Tensor, fresh: bool = True) -> Tensor:
    """F of row k for an input of N or M images."""
    images = len(x_in)
    cond = s.cond if images == len(s.x_in) else _first(s.cond, images)
    # what only a fd.UNet takes
    own: dict[str, Any] = {}
    if s.deep is not None:
        own["deep"] = Deep(program.stages, s.deep[:images], fresh)
    if s.table is not None:
        own["table_row"] = s.table.index_select(0, s.k)[0, :images]
    t = None if s.table is not None else s.times.index_select(0, s.k).expand(images)
    return program.net(x_in, t, cond, **own)


def _steered(program: Program, s: State, kind: Kind) -> Tensor:
    """F' of row k: forward, and backward to x, through the network where an energy looks at x0."""
    images, channels = kind.images, s.x.shape[1]
    r = s.rows.index_select(0, s.k)[0]
    through = any(e.of == "x0" for e in program.energies)
    with torch.enable_grad():
        x = s.x.detach().requires_grad_()
        x_in = s.x_in[:images]
        if through:
            x_in = _doubled((r[row.C_IN] * x).to(x_in.dtype), images).to(memory_format=layout(x_in))
        # an energy of x_t asks nothing of the network, which then keeps nothing for a way back
        with torch.set_grad_enabled(through):
            F = _network(program, s, x_in, kind.fresh)
        total = _energy(program, s, x, x0_ref(x, F, r) if through else x)
        (grad,) = torch.autograd.grad(total, x)
    F = F.detach().to(x.dtype)
    push = r[row.SIGMA] ** 2 / (r[row.ALPHA] * r[row.C_OUT]) * grad
    return torch.cat([F[:, :channels] - _doubled(push, images), F[:, channels:]], 1)


def _doubled(x: Tensor, images: int) -> Tensor:
    """x, or x behind x."""
    return x if len(x) == images else torch.cat([x, x])


def _energy(program: Program, s: State, x: Tensor, x0: Tensor) -> Tensor:
    """sum w_i E_i over energies and images."""
    n = len(x)
    t = s.times.index_select(0, s.k).expand(n)
    total = x.new_zeros(())
    pulls = s.pulls.index_select(0, s.k)[0]
    for e, told, weight in zip(program.energies, s.told, pulls, strict=True):
        E = e.f(x0 if e.of == "x0" else x, t, _first(s.cond, n) if told is None else told)
        if E.shape != (n,):
            raise ValueError(f"energy: {e.f!r} returned {tuple(E.shape)} for {n} images; return one number an image")
        total = total + weight * E.sum()
    return total
