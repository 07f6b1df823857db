"""The buffers of a run, and what the host must know of it.

Everything that changes from row to row, and from call to call, is read from these buffers: so one compiled or captured
step serves every solver, step count, weight, seed and condition.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from fastdiff.ops import normal, philox
from fastdiff.sampling.guidance import Cond, Potential


class State(NamedTuple):
    """The buffers of a run, all on one device. N images, M of them in the network's input: N, or 2N under guidance."""

    x: Tensor  # (N, C, *spatial)
    x_in: Tensor  # (M, C, *spatial), the network's dtype: [conditional, unconditional]
    h: Tensor  # (3, N, C, *spatial), history
    x0: Tensor | None  # (N, C, *spatial), of the last watched row
    rows: Tensor  # (capacity, columns)
    times: Tensor  # (capacity,), column T in the dtype that the network is told
    table: Tensor | None  # (capacity, 1 or M, width), lines of net.time_table where the network has one
    deep: Tensor | None  # M images, what the deep part of the network last gave, where it is reused
    k: Tensor  # (1,) int64, the next row
    seed: Tensor  # (1,) int64
    number: Tensor  # (N,) int64, the images' numbers: `index` of the ops
    cond: Cond  # M images
    told: tuple[Cond, ...]  # N images, what each energy is told in place of cond; None is cond itself
    pulls: Tensor  # (capacity, energies), their weights
    bad: Tensor  # (N,) int64, first row whose result was not finite, else -1


class Program(NamedTuple):
    """What a run does not change: the network, the function that runs `step_`, the kind of variance, the energies."""

    net: Callable[..., Tensor]
    step_: Callable[..., None]
    variance: str | None
    energies: tuple[Potential, ...] = ()
    stages: int = 0
    """Of the way up, that run in every row where the deep part is reused."""


class Kind(NamedTuple):
    """What the host must know of a row, and a compiled or captured step is made for."""

    images: int
    """In the network's input: N where the row needs no unconditional half, else M."""
    watched: bool = False
    """Whether the caller wants to see x0."""
    steered: bool = False
    """Whether the energies act on it."""
    fresh: bool = True
    """Whether the deep part of the network runs."""


def enter(s: State, c_in: float) -> None:
    """Write the network's input from the state: c_in x, in both halves under guidance."""
    for half in s.x_in.tensor_split(2 if len(s.x_in) > len(s.x) else 1):
        half.copy_(c_in * s.x)


def prior(s: State, scale: float) -> None:
    """x_T = scale z, z from Philox stream 0."""
    z = normal(s.seed, s.number, 0, philox.X_T, s.x.shape[1:], s.x.dtype)
    s.x.copy_(scale * z)
