"""What a sampler owns, and the one step that every solver repeats.

F = net(x_in, t, cond);   step_(x, x_in, h, F, rows, k, index, seed);   k += 1
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from fastdiff.ops import normal, philox
from fastdiff.ops.step import check
from fastdiff.sampling.guidance import Cond, map_cond


class State(NamedTuple):
    """The buffers of a run, all on one device. N images, M of them in the network's input: N, or 2N under guidance."""

    x: Tensor  # (N, C, *spatial)
    x_in: Tensor  # (M, C, *spatial), the network's dtype: [conditional, unconditional]
    h: Tensor  # (3, N, C, *spatial), history
    rows: Tensor  # (capacity, columns)
    times: Tensor  # (capacity,), column T in the dtype that the network is told
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


def network(program: Program, s: State, batch: int) -> Tensor:
    """F of row k: `batch` images of x_in, N where the row needs no unconditional half, else all M."""
    cond = s.cond if batch == len(s.x_in) else map_cond(lambda c: c[:batch], s.cond)
    return program.net(s.x_in[:batch], s.times.index_select(0, s.k).expand(batch), cond)


def one_step(
    program: Program,
    s: State,
    batch: int,
    noise: Tensor | None = None,
    seen: Callable[[Tensor], object] | None = None,
) -> None:
    """One network call and one row: all that a run repeats, with no host decision in it.

    noise: z of the row instead of Philox; seen(F) is called before the state changes.
    """
    F = network(program, s, batch)
    if seen is not None:
        seen(F)
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
