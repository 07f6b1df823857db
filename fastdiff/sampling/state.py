"""The buffers of a run, and the one step that every solver repeats on them.

F = net(x_in, t, cond);   step_(x, x_in, h, F, rows, k, index, seed);   k += 1

Everything that changes from row to row, and from call to call, is read from these buffers: so one compiled or captured
step serves every solver, step count, weight, seed and condition.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from fastdiff import row
from fastdiff.ops import normal, philox
from fastdiff.ops.step import check, x0_ref
from fastdiff.sampling.guidance import Cond, map_cond


class State(NamedTuple):
    """The buffers of a run, all on one device. N images, M of them in the network's input: N, or 2N under guidance."""

    x: Tensor  # (N, C, *spatial)
    x_in: Tensor  # (M, C, *spatial), the network's dtype: [conditional, unconditional]
    h: Tensor  # (3, N, C, *spatial), history
    x0: Tensor | None  # (N, C, *spatial), of the last watched row
    rows: Tensor  # (capacity, columns)
    times: Tensor  # (capacity,), column T in the dtype that the network is told
    table: Tensor | None  # (capacity, 1 or M, width), lines of net.time_table where the network has one
    k: Tensor  # (1,) int64, the next row
    seed: Tensor  # (1,) int64
    number: Tensor  # (N,) int64, the images' numbers: `index` of the ops
    cond: Cond  # M images
    bad: Tensor  # (N,) int64, first row whose result was not finite, else -1


class Program(NamedTuple):
    """What a run does not change: the network, the function that runs `step_`, the kind of variance."""

    net: Callable[..., Tensor]
    step_: Callable[..., None]
    variance: str | None


class Kind(NamedTuple):
    """What the host must know of a row, and a compiled or captured step is made for."""

    images: int
    """In the network's input: N where the row needs no unconditional half, else M."""
    watched: bool = False
    """Whether the caller wants to see x0."""


def network(program: Program, s: State, images: int) -> Tensor:
    """F of row k for the first `images` of x_in."""
    cond = s.cond if images == len(s.x_in) else map_cond(lambda c: c[:images], s.cond)
    x_in = s.x_in[:images]
    if s.table is not None:
        return program.net(x_in, None, cond, table_row=s.table.index_select(0, s.k)[0, :images])
    return program.net(x_in, s.times.index_select(0, s.k).expand(images), cond)


def one_step(program: Program, s: State, kind: Kind, noise: Tensor | None = None) -> None:
    """One network call and one row: all that a run repeats, with no host decision in it.

    noise: z of the row instead of Philox. A watched row leaves its clipped x0 in s.x0.
    """
    F = network(program, s, kind.images)
    if kind.watched:
        assert s.x0 is not None
        r = s.rows.index_select(0, s.k)[0]
        s.x0.copy_(x0_ref(s.x, F, r).clamp(-r[row.CLIP], r[row.CLIP]))
    args = (s.x, s.x_in, s.h, F, s.rows, s.k, s.number, s.seed)
    check(*args, variance=program.variance, noise=noise, bad=s.bad)
    program.step_(*args, variance=program.variance, noise=noise, bad=s.bad)
    s.k.add_(1)


def enter(s: State, c_in: float) -> None:
    """Write the network's input from the state: c_in x, in both halves under guidance."""
    for half in s.x_in.tensor_split(2 if len(s.x_in) > len(s.x) else 1):
        half.copy_(c_in * s.x)


def prior(s: State, scale: float) -> None:
    """x_T = scale z, z from Philox stream 0."""
    z = normal(s.seed, s.number, 0, philox.X_T, s.x.shape[1:], s.x.dtype)
    s.x.copy_(scale * z)
