"""Euler and Heun on the probability flow in u, with churn (Karras 2022)."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from fastdiff.tables.curve import Array
from fastdiff.tables.grid import Levels
from fastdiff.tables.solvers.table import Table, steps_of, table_of


class _Churn(NamedTuple):
    hat: Array  # (n,) level after the added noise
    kick: Array  # (n,) noise that the row into the next level adds
    into: Array  # (n,) alpha of the level that the step's last row hands on


def _churn(levels: Levels, solver: str, churn: float, s_min: float, s_max: float) -> _Churn:
    """u_hat = u (1 + gamma), gamma = min(churn/n, sqrt(2) - 1) where s_min <= u <= s_max (Karras 2022, algorithm 2)."""
    if not churn >= 0:
        raise ValueError(f"churn must be >= 0, got {churn}; 0 is deterministic")
    u, _ = steps_of(levels, f"{solver} with churn={churn:g}" if churn > 0 else solver, noise=churn > 0)
    gamma = min(churn / max(len(u), 1), 2**0.5 - 1)
    chosen = (u >= s_min) & (u <= s_max) & (gamma > 0)
    hat, into = u.copy(), levels.alpha[1:].copy()
    hat[chosen] = levels.snap(u[chosen] * (1 + gamma))
    moved = hat[1:] != u[1:]
    into[:-1][moved] = levels.at(hat[1:][moved])[1]
    # churn noise belongs to the previous row, so no row draws twice; the first level's is drawn with x itself
    kick = np.sqrt(np.maximum((hat - u) * (hat + u), 0))
    return _Churn(hat, np.append(kick[1:], np.zeros(min(len(u), 1))), into)


def euler(levels: Levels, churn: float = 0.0, s_min: float = 0.0, s_max: float = np.inf, s_noise: float = 1.0) -> Table:
    """y' = y + (v - u)(y - x0)/u, Euler on the probability flow dy/du = eps (Karras 2022, algorithm 2 without line 8).

    churn, s_min, s_max (levels of u), s_noise: the paper's S_churn, S_tmin, S_tmax, S_noise. s_noise != 1 leaves the
    marginals and is a declared table.
    Raises ValueError for churn < 0, and churn > 0 towards more noise.
    """
    c = _churn(levels, "euler", churn, s_min, s_max)
    u, v = c.hat, levels.u[1:]
    table = table_of(u, a=v / u, b0=(u - v) / u, s=s_noise * c.kick)
    if s_noise == 1:
        return table
    return table._replace(declared=_karras(c.into, v, s_noise * c.kick))


def heun(levels: Levels, churn: float = 0.0, s_min: float = 0.0, s_max: float = np.inf, s_noise: float = 1.0) -> Table:
    """y_v = y + (v - u) eps_u, then y' = y + (v - u)(eps_u + eps_v)/2; Euler on the step to clean data.

    Karras 2022, algorithm 2; options as in `euler`. Two rows a step: the first remembers y + (v - u) eps_u/2.
    """
    c = _churn(levels, "heun", churn, s_min, s_max)
    u, v, last = c.hat, levels.u[1:], levels.u[1:] == 0
    some = np.where(last, 1.0, v)
    half = (v - u) / 2
    first = table_of(u, a=v / u, b0=(u - v) / u, p=(u + v) / (2 * u), q=-half / u, end=last)
    second = table_of(v, a=half / some, b0=-half / some, b1=1.0, s=s_noise * c.kick)
    keep = np.stack([np.ones_like(last), ~last], axis=1).ravel()

    def weave(one: Array, two: Array) -> Array:
        return np.asarray(np.stack([one, two], axis=1).reshape(-1, *one.shape[1:])[keep])

    table = Table(
        weave(u, v), weave(first.coef, second.coef), weave(first.hist, second.hist), weave(first.end, second.end)
    )
    if s_noise == 1:
        return table
    stage = _karras(levels.alpha[1:], v, np.zeros_like(v))
    return table._replace(declared=weave(stage, _karras(c.into, v, s_noise * c.kick)))


def _karras(alpha: Array, v: Array, kick: Array) -> Array:
    """The declaration of alpha (x0 + v eps + kick z)."""
    return np.stack([alpha, alpha * v, (alpha * kick) ** 2], axis=1)
