"""Rows run in NumPy float64, a network to run them on, and a Gaussian whose denoiser and ODE are closed forms."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import numpy as np

from fastdiff import row
from fastdiff.tables.curve import Array, Schedule
from fastdiff.tables.plan import plan

C = 0.6
"""Standard deviation of the Gaussian's x0."""


def run(
    rows: Array,
    x: Array,
    network: Callable[[Array, Array], Array],
    noise: Iterable[Array] | None = None,
    h: Array | None = None,
) -> Array:
    """The loop that every table stands for, as `fastdiff.row` states it; network(x, line) -> F, noise one z per row.

    h: the slots that `rows` start from, and write to; slots start as NaN without.
    """
    x = np.array(x, dtype=np.float64)
    h = np.full((row.SLOTS, *np.shape(x)), np.nan) if h is None else h
    draws = iter(noise) if noise is not None else None
    for line in rows[:-1]:
        F = network(line[row.C_IN] * x, line)
        x0 = np.clip(line[row.C_SKIP] * x + line[row.C_OUT] * F, -line[row.CLIP], line[row.CLIP])
        z = next(draws) if draws is not None else None
        y = line[row.A] * x + line[row.B0] * x0 + line[row.BF] * F
        for j in range(row.SLOTS):
            # a zero coefficient means that the operand is not read
            if line[row.B1 + j] != 0:
                y = y + line[row.B1 + j] * h[j]
        if line[row.S] != 0 and z is not None:
            y = y + line[row.S] * z
        if line[row.P] != 0 or line[row.Q] != 0:
            h[int(line[row.SLOT])] = line[row.P] * x + line[row.Q] * x0
        x = y
    return x


def net(x: Array, t: float) -> Array:
    """A network that mixes its pixels and knows the time, smooth enough that a loop does not magnify rounding."""
    return np.asarray(np.sin(0.5 * x + 0.01 * t) + 0.1 * np.tanh(x[..., ::-1]))


def network(x: Array, line: Array) -> Array:
    """`net`, told what the row tells."""
    return net(x, line[row.T])


def denoiser(x: Array, line: Array) -> Array:
    """F of the Gaussian N(0, C^2): the output whose x0 is E[x0 given x]."""
    alpha, sigma = line[row.ALPHA], line[row.SIGMA]
    x = x / line[row.C_IN]
    x0 = C * C * alpha * x / ((C * alpha) ** 2 + sigma**2)
    return np.asarray((x0 - line[row.C_SKIP] * x) / line[row.C_OUT])


def error(rows: Array, before: int = 0) -> float:
    """|x - exact| at the end of the probability-flow ODE dy/du = (y - x0)/u, whose solution is y ~ sqrt(C^2 + u^2).

    before: that many rows receive the exact state and only remember, so that a method's start-up rows have no say.
    """
    exact = np.hypot(C * rows[:, row.ALPHA], rows[:, row.SIGMA])
    h = np.full(row.SLOTS, np.nan)
    for k in range(before):
        run(rows[k : k + 2], exact[k], denoiser, h=h)
    return float(abs(run(rows[before:], exact[before], denoiser, h=h) - exact[-1]) / exact[-1])


def uneven(schedule: Schedule, n: int) -> Array:
    """n steps from u = 10 to 0.05 that alternate 1 : 2 in log u."""
    part = np.append(0, np.cumsum(np.where(np.arange(n) % 2 == 0, 1.0, 2.0)))
    return schedule.inverse(10 * np.exp(part / part[-1] * np.log(0.05 / 10)))


def order(
    schedule: Schedule,
    solver: Callable[..., object],
    *,
    predicts: str = "v",
    invert: bool = False,
    before: int = 0,
    finest: int = 256,
    **options: object,
) -> float:
    """Measured order of convergence over u in [0.05, 10]: the last halving's of n = 64, 128, 256, or up to `finest`.

    before: as in `error`.

    Steps in log u alternate 1 : 2, so that a multistep weight which takes neighbouring steps as equal shows.
    """
    errors = []
    for n in (finest // 4, finest // 2, finest):
        t = uneven(schedule, n)
        rows = plan(schedule, predicts, solver, times=t[::-1] if invert else t, **options)  # type: ignore[arg-type]
        errors.append(error(rows, before))
    assert errors[0] > errors[1] > errors[2] or errors[2] > 1e-3
    return math.log2(errors[1] / errors[2])
