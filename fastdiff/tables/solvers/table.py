"""What a solver is: a pure function from noise levels to the numbers of a table; no tensor, no network, no loop.

A row works on y = x/alpha, where y = x0 + u eps and u = sigma/alpha, and h_j is the j-th last memory:

    y' = a y + b0 x0 + be eps + b1 h1 + b2 h2 + b3 h3 + s z          h = p y + q x0

`plan` turns the table into rows for x = alpha y and checks what it promises. `exact` tables (declared None) hand every
row the marginal (alpha, sigma) that it claims; `declared` ones name mean and variance of their one step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from fastdiff.tables.curve import Array
from fastdiff.tables.grid import Levels


class Table(NamedTuple):
    """One line per network call."""

    u: Array
    """(K,) the level at which each row evaluates the network."""
    coef: Array
    """(K, 7) a, b0, be, b1, b2, b3, s."""
    hist: Array
    """(K, 2) p, q."""
    end: Array
    """(K,) 1 on rows that finish a grid step, 0 on stages inside one."""
    eta: float = 0.0
    """A step from u = inf draws noise of eta sigma_s."""
    variance: Array | None = None
    """(K, 4) V0..V3 for x (not y): the noise is s sqrt(s2) z with s2 read from the network, and s is 1 or 0."""
    declared: Array | None = None
    """(K, 3) of x' from the exact state: weight of x0, weight of eps, variance of the noise. None: an exact table."""


Solver = Callable[..., Table]


def table_of(
    u: Array,
    *,
    a: npt.ArrayLike,
    b0: npt.ArrayLike,
    be: npt.ArrayLike = 0.0,
    b1: npt.ArrayLike = 0.0,
    b2: npt.ArrayLike = 0.0,
    s: npt.ArrayLike = 0.0,
    p: npt.ArrayLike = 0.0,
    q: npt.ArrayLike = 0.0,
    end: npt.ArrayLike = 1.0,
    eta: float = 0.0,
) -> Table:
    """A table from its columns, numbers or (K,) each."""

    def columns(*parts: npt.ArrayLike) -> Array:
        return np.stack([np.broadcast_to(np.asarray(part, np.float64), u.shape) for part in parts], axis=1)

    return Table(u, columns(a, b0, be, b1, b2, 0.0, s), columns(p, q), columns(end)[:, 0], eta)


def steps_of(levels: Levels, solver: str, *, noise: bool = False) -> tuple[Array, Array]:
    """u and v of each step; `noise` solvers run towards less noise only."""
    u, v = levels.u[:-1], levels.u[1:]
    if (u == 0).any():
        raise ValueError(
            f"{solver} cannot leave clean data (u = 0 at step {int(np.argmax(u == 0))}): eps is not defined there; "
            'start an inversion at a noisy level, e.g. times(..., final="first")[::-1] or t_end=1e-3'
        )
    if not np.isfinite(levels.u).all():
        raise ValueError(f"{solver} needs finite u = sigma/alpha, got {levels.u}; plan replaces a first step from inf")
    if noise and (v > u).any():
        k = int(np.argmax(v > u))
        raise ValueError(
            f"{solver} draws noise and cannot run towards more of it (u goes from {u[k]:g} to {v[k]:g} at step {k}); "
            "invert with ddim (eta=0), euler or heun (churn=0) or dpmpp_2m"
        )
    return u, v
