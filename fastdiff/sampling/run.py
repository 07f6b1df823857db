"""How the rows of a plan are run. `eager` repeats the one step from Python; it knows the rows on the host."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from torch import Tensor

from fastdiff import row
from fastdiff.ops.step import x0_ref
from fastdiff.sampling.state import Program, State, advance, enter, network

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
        z = None
        if noise is not None and r[row.S] != 0:
            z = next(noise).to(s.x)
        F = network(program, s, n if r[row.W] == 1 else len(s.x_in))
        ends = each is not None and r[row.END] == 1
        x0 = x0_ref(s.x, F, s.rows[k]).clamp(-r[row.CLIP], r[row.CLIP]) if ends else None
        advance(program, s, F, z)
        if each is not None and x0 is not None:
            replaced = each(done, s.x.clone(), x0)
            done += 1
            if replaced is not None:
                s.x.copy_(replaced)
                enter(s, rows[k + 1, row.C_IN])
        if tick is not None:
            tick()


auto = eager
"""The run that `fd.sample` uses unless told otherwise."""
