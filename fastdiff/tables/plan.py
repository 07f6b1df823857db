"""schedule x prediction x solver x guidance -> rows: the numbers that the one step runs on, their promise checked."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fastdiff import row
from fastdiff.tables.curve import Array, Schedule
from fastdiff.tables.grid import Levels, levels, times as grid_times
from fastdiff.tables.predict import PREDICTS, direction, predict
from fastdiff.tables.promise import check
from fastdiff.tables.solvers import Solver, Table


class _Lines(NamedTuple):
    """The level of every row, and of the result: (K + 1,) each."""

    t: Array
    alpha: Array
    sigma: Array
    u: Array


class _Reading(NamedTuple):
    """How the network's output is read on the K rows: x0 = c_skip x + c_out F, eps = e_skip x + e_out F."""

    c_skip: Array
    c_out: Array
    e_skip: Array
    e_out: Array


def plan(
    schedule: Schedule,
    predicts: str,
    solver: Solver,
    *,
    steps: int | None = None,
    spacing: str | Callable[[Schedule, int], npt.ArrayLike] | None = None,
    times: npt.ArrayLike | None = None,
    grid: Levels | None = None,
    final: str = "zero",
    t_end: float | None = None,
    denoise: bool = False,
    steps_offset: int = 0,
    quantize: bool = False,
    clip: float | None = None,
    w: float | Callable[[float], float] = 1.0,
    sigma_data: float = 0.5,
    **options: Any,
) -> Array:
    """Rows of `fastdiff.row`, float64 (K + 1, COLUMNS): K network calls and a last line for the result.

    predicts: a name of PREDICTS; "+range" behind it where the network's second half of channels is a variance.
    steps, spacing, final, t_end, denoise, steps_offset: as in `times`; or times (n + 1,), the levels themselves, which
        may increase (inversion). quantize: only levels of the schedule's own steps, stages included. Or grid, levels
        whose alpha and sigma are not what the schedule has at the t that the network is told (another program's).
    clip: bound on |x0|, None is none. w: guidance weight, a number or a function of u = sigma/alpha.
    options: of the solver. A first level of pure noise (alpha = 0) is the limit row of every solver.
    Raises ValueError for options that the solver lacks, impossible levels, and a table that breaks its own promise.
    """
    kind = _kind(predicts)
    _known(solver, options)
    if clip is not None and not clip > 0:
        raise ValueError(f"clip must be > 0, got {clip}; None is no clipping")
    if (times is not None or grid is not None) and (steps is not None or spacing is not None):
        raise ValueError(f"times are the levels themselves, so leave out steps={steps} and spacing={spacing!r}")
    if grid is None:
        if times is None:
            times = grid_times(
                schedule, steps, spacing, final=final, t_end=t_end, denoise=denoise, steps_offset=steps_offset
            )
        grid = levels(schedule, times, quantize)
    table, limit = _table(solver, options, grid)
    if table.variance is not None and not predicts.endswith("+range"):
        raise ValueError(
            f"{_name(solver)} reads a learned variance that predicts={predicts!r} has not; use 'eps+range'"
        )
    lines = _lines(grid, table, limit)
    reading = _reading(schedule, kind, lines, sigma_data)
    rows = np.zeros((len(lines.u), row.COLUMNS))
    rows[:, row.CLIP] = np.inf
    _fill_levels(rows, schedule, kind, lines, reading, sigma_data)
    rows[:-1, row.W] = [w(float(u)) for u in lines.u[:-1]] if callable(w) else w
    if clip is not None:
        rows[:-1, row.CLIP] = clip
    declared = _fill_steps(rows, table, lines, reading, limit)
    _fill_history(rows, table, lines, limit, _name(solver))
    check(rows, declared, _name(solver))
    return rows


def exploding(rows: Array) -> Array:
    """The same rows for the state y = x/alpha of noise u = sigma/alpha (the variance exploding form); alpha > 0.

    The network still sees C_IN y = x, and x0 is the same.
    """
    out = rows.copy()
    here, after = rows[:-1, row.ALPHA], rows[1:, row.ALPHA]
    out[:, row.C_IN] *= rows[:, row.ALPHA]
    out[:-1, [row.A, row.C_SKIP, row.P]] *= here[:, None]
    out[:-1, [row.A, row.B0, row.BF, row.B1, row.B2, row.B3, row.S]] /= after[:, None]
    out[:, row.SIGMA] /= rows[:, row.ALPHA]
    out[:, row.ALPHA] = 1.0
    return out


def _name(solver: Solver) -> str:
    return str(getattr(solver, "__name__", solver))


def _kind(predicts: str) -> str:
    kind = predicts.removesuffix("+range")
    if kind not in PREDICTS:
        raise ValueError(f"predicts={predicts!r} is not one of {', '.join(PREDICTS)}, each also with +range")
    return kind


def _known(solver: Solver, options: dict[str, Any]) -> None:
    """An unknown option raises with the solver's own list."""
    own = list(inspect.signature(solver).parameters.values())[1:]
    if any(p.kind is p.VAR_KEYWORD for p in own):
        return
    names = [p.name for p in own]
    for name in options:
        if name not in names:
            raise ValueError(f"{_name(solver)} has no option {name!r}; its options: {', '.join(names) or 'none'}")


def _table(solver: Solver, options: dict[str, Any], grid: Levels) -> tuple[Table, bool]:
    """The solver's table, and whether a limit row for a first level of u = inf goes before it."""
    if np.isinf(grid.u[1:]).any():
        k = 1 + int(np.argmax(np.isinf(grid.u[1:])))
        raise ValueError(f"alpha is 0 at level {k} (t = {grid.t[k]:g}); only the first level may be pure noise")
    limit = bool(np.isinf(grid.u[0]))
    seen = grid
    if limit:
        seen = grid._replace(t=grid.t[1:], alpha=grid.alpha[1:], sigma=grid.sigma[1:], u=grid.u[1:])
    table = solver(seen, **options)
    K = len(table.u)
    shapes = {"coef": (K, 7), "hist": (K, 2), "end": (K,)}
    wrong = [
        f"{f} {np.shape(getattr(table, f))}" for f, shape in shapes.items() if np.shape(getattr(table, f)) != shape
    ]
    if wrong or (K == 0 and not limit):
        raise ValueError(f"{_name(solver)} made a table of {K} rows with {', '.join(wrong) or 'none'}; need {shapes}")
    if table.variance is not None and table.declared is None:
        raise ValueError(f"{_name(solver)} reads a variance and so must say what its step is: set Table.declared")
    return table, limit


def _lines(grid: Levels, table: Table, limit: bool) -> _Lines:
    """Levels of the grid with their own numbers, others (stages, churn) through `at`."""
    u = np.concatenate([grid.u[:1] if limit else grid.u[:0], table.u, grid.u[-1:]])
    order = np.argsort(grid.u, kind="stable")
    found = order[np.minimum(np.searchsorted(grid.u[order], u), len(order) - 1)]
    t, alpha, sigma = (part[found] for part in grid[:3])
    off = grid.u[found] != u
    if off.any():
        t[off], alpha[off], sigma[off] = grid.at(u[off])
    return _Lines(t, alpha, sigma, u)


def _reading(schedule: Schedule, kind: str, lines: _Lines, sigma_data: float) -> _Reading:
    t, alpha, sigma = (part[:-1] for part in lines[:3])
    previous = None
    if kind == "mean":
        if schedule.T is None or (t != np.rint(t)).any():
            raise ValueError(
                "predicts='mean' knows whole steps of a discrete schedule only; pass quantize=True, or a spacing "
                "of whole steps such as 'trailing'"
            )
        previous = schedule.alpha(t - 1), schedule.sigma(t - 1)
    _, c_skip, c_out = predict(kind, alpha, sigma, sigma_data=sigma_data, previous=previous)
    e_skip, e_out = direction(kind, alpha, sigma, sigma_data=sigma_data, previous=previous)
    return _Reading(c_skip, c_out, e_skip, e_out)


def _fill_levels(
    rows: Array, schedule: Schedule, kind: str, lines: _Lines, reading: _Reading, sigma_data: float
) -> None:
    told = np.array(schedule.told(lines.t), dtype=np.float64)
    # no network is called at the result, and ln(0) of a clean level has no place in a table of projections
    rows[:, row.T] = np.where(np.isfinite(told), told, schedule.told(np.array([schedule.t_end])))
    scaled = kind if kind == "edm" else "x0"
    rows[:, row.C_IN] = predict(scaled, lines.alpha, lines.sigma, sigma_data=sigma_data)[0]
    rows[:, row.ALPHA], rows[:, row.SIGMA] = lines.alpha, lines.sigma
    rows[:-1, row.C_SKIP], rows[:-1, row.C_OUT] = reading.c_skip, reading.c_out
    rows[:-1, row.SLOT] = np.arange(len(rows) - 1) % row.SLOTS


def _fill_steps(rows: Array, table: Table, lines: _Lines, reading: _Reading, limit: bool) -> Array | None:
    """A, B0, BF, S, END, V0..V3 for x = alpha y; returns what the table declares, with the limit row's before it."""
    first = int(limit)
    own = slice(first, -1)
    alpha, sigma, u = lines.alpha[own], lines.sigma[own], lines.u[own]
    alpha_s, sigma_s, v = lines.alpha[first + 1 :], lines.sigma[first + 1 :], lines.u[first + 1 :]
    a, b0, be, *_, s = table.coef.T
    noisy = v > 0
    # through sigma: alpha of the first levels may be tiny, and ddim's a is sigma_s/sigma_t to the last digit
    scale = np.where(noisy, u / np.where(noisy, v, 1) * (sigma_s / sigma), alpha_s / alpha)
    rows[own, row.A] = a * scale + alpha_s * be * reading.e_skip[first:]
    rows[own, row.B0] = alpha_s * b0
    rows[own, row.BF] = alpha_s * be * reading.e_out[first:]
    rows[own, row.S] = s if table.variance is not None else alpha_s * s
    rows[own, row.END] = table.end
    if table.variance is not None:
        rows[own, row.V0 : row.V3 + 1] = table.variance
    if not limit:
        return table.declared
    if table.eta > 1:
        raise ValueError(f"eta={table.eta} draws more noise at the first step than its level has; use eta <= 1")
    d, kept = table.eta * lines.sigma[1], lines.sigma[1] * np.sqrt((1 - table.eta) * (1 + table.eta))
    rows[0, row.A], rows[0, row.B0], rows[0, row.S] = kept / lines.sigma[0], lines.alpha[1], d
    rows[0, row.END] = 1.0
    if table.variance is not None:
        # the network's variance has no say in the limit row
        rows[0, row.S] = float(d > 0)
        rows[0, row.V0 : row.V1 + 1] = 2 * np.log(d) if d > 0 else 0.0
    return None if table.declared is None else np.vstack([[lines.alpha[1], kept, d * d], table.declared])


def _fill_history(rows: Array, table: Table, lines: _Lines, limit: bool, name: str) -> None:
    """P, Q, SLOT, B1, B2, B3: slots never move, so h_j reads the slot that the j-th memory before this row went to."""
    first = int(limit)
    k = np.arange(first, len(rows) - 1)
    writes = (table.hist != 0).any(axis=1)
    # memories before each row, and the row that made each
    before = np.cumsum(writes) - writes
    made = np.flatnonzero(writes)
    read = np.zeros(len(writes), dtype=bool)
    for lag in range(1, row.SLOTS + 1):
        b = table.coef[:, 2 + lag] * lines.alpha[first + 1 :]
        some = b != 0
        if (before[some] < lag).any():
            bad = int(k[some][0])
            raise ValueError(f"{name} reads a history of {lag} rows at row {bad}, where there is none; start it lower")
        rows[k[some], row.B1 + (before[some] - lag) % row.SLOTS] = b[some]
        read[made[before[some] - lag]] = True
    rows[k[writes], row.SLOT] = before[writes] % row.SLOTS
    p, q = table.hist.T
    # a slot that no later row reads is not written
    rows[k, row.P] = np.where(read, p / lines.alpha[k], 0.0)
    rows[k, row.Q] = np.where(read, q, 0.0)
