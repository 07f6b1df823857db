"""How the rows of a plan are run. `eager` repeats the one step from Python; it knows the rows on the host."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from torch import Tensor

from fastdiff import row
from fastdiff.ops.step import x0_ref
from fastdiff.sampling.state import Program, State, enter, one_step

Each = Callable[[int, Tensor, Tensor], Tensor | None]
"""each(i, x, x0) after grid step i, with copies; what it returns, if anything, replaces x."""


Runner = Callable[..., None]
"""A function with the arguments of `eager`: leaves the result in s.x and the first bad rows in s.bad."""


def eager(
    program: Program,
    s: State,
    rows: np.ndarray[Any, Any],
    *,
    each: Each | None = None,
    noise: Iterator[Tensor] | None = None,
    tick: Callable[[], object] | None = None,
) -> None:
    """Row by row from Python, reading nothing back from the device.

    rows: the plan's float64 numbers on the host, (K + 1, columns); s holds them cast, on the device. Rows with W = 1
    call the network on the conditional half only. noise: an iterator of z, one for each row that draws.
    """
    n, done = len(s.x), 0
    for k, r in enumerate(rows[:-1]):
        z = _next(noise, k).to(s.x) if noise is not None and r[row.S] != 0 else None
        batch = n if r[row.W] == 1 else len(s.x_in)
        if each is None or r[row.END] != 1:
            one_step(program, s, batch, z)
        else:
            _watched_step(program, s, batch, z, rows[k : k + 2], each, done)
            done += 1
        if tick is not None:
            tick()


def _next(noise: Iterator[Tensor], k: int) -> Tensor:
    z = next(noise, None)
    if z is None:
        raise ValueError(f"noise: the iterator ended before row {k}; give one z for each row that draws")
    return z


def _watched_step(
    program: Program, s: State, batch: int, z: Tensor | None, rows: np.ndarray[Any, Any], each: Each, done: int
) -> None:
    """The step, then the caller's look at it; what the caller returns replaces x."""
    r, after = rows
    x0: list[Tensor] = []
    line = s.rows.index_select(0, s.k)[0]
    one_step(program, s, batch, z, lambda F: x0.append(x0_ref(s.x, F, line).clamp(-r[row.CLIP], r[row.CLIP])))
    replaced = each(done, s.x.clone(), x0[0])
    if replaced is None:
        return
    if replaced.shape != s.x.shape:
        raise ValueError(f"each returned {tuple(replaced.shape)} for a state {tuple(s.x.shape)}; return x or None")
    s.x.copy_(replaced)
    enter(s, after[row.C_IN])


auto = eager
"""The run that `fd.sample` uses unless told otherwise."""
