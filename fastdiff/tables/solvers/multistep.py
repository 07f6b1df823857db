"""Methods that remember what the network said on earlier steps: DPM-Solver in its forms, and PLMS."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from fastdiff.tables.curve import Array
from fastdiff.tables.grid import Levels
from fastdiff.tables.solvers.table import Table, steps_of, table_of

ALGORITHMS = ("dpmsolver++", "sde-dpmsolver++", "dpmsolver", "sde-dpmsolver")
KINDS = ("midpoint", "heun")
SHORT = 15
"""Below as many steps the last ones take lower orders (diffusers' rule, Lu 2022)."""


class _Past(NamedTuple):
    """Step lengths h = log(u/v), 0 on the step to clean data; those before, and how many points each step uses."""

    h: Array
    h1: Array
    h2: Array
    two: Array
    three: Array

    def spread(self, line: Array, parabola: Array) -> tuple[Array, Array, Array]:
        """Weights of m0, m1, m2, the values at this row and the two before, beside m0's own; they add up to 0.

        line: weight of D1, the slope over a step h; parabola: of D2, half of the bend over h^2 (Newton's differences).
        """
        d1, d2 = np.where(self.two, self.h1, 1.0), np.where(self.three, self.h2, 1.0)
        span = np.where(self.three, self.h1 + self.h2, 1.0)
        L = self.two * line * self.h
        P = self.three * (line * self.h * self.h1 + parabola * self.h**2) / span
        slope, bend = (L + P) / d1, P / d2
        return slope, -slope - bend, bend


def _past(u: Array, v: Array, order: int, ends: tuple[int, ...]) -> _Past:
    h = np.log(u / np.where(v > 0, v, u))
    h1, h2 = np.append(0.0, h)[: len(h)], np.append([0.0, 0.0], h)[: len(h)]
    orders = np.full(len(h), order)
    last = min(len(ends), len(h))
    if last:
        orders[-last:] = np.minimum(orders[-last:], ends[-last:])
    # a parabola needs three levels in a row, a line two
    return _Past(h, h1, h2, (h1 != 0) & (orders >= 2), (h1 * h2 > 0) & (orders >= 3))


def _data(
    levels: Levels,
    name: str,
    eta: float,
    order: int,
    kind: str = "heun",
    ends: tuple[int, ...] = (),
    corrected: bool = False,
) -> Table:
    """y' = (v/u)^(1 + eta) y + int_0^1 k e^{-k (1 - r)} x0(r) dr + noise, k = (1 + eta) h; x0(r) from the past.

    kind: of the rows of order 2, "heun" integrates the line exactly, "midpoint" takes its value in the middle.
    """
    u, v = steps_of(levels, f"{name} with eta={eta:g}" if eta > 0 else name, noise=eta > 0)
    past = _past(u, v, order, ends)
    h = past.h
    k = (1 + eta) * h
    some = np.where(h != 0, k, 1.0)
    c = np.where(v > 0, -np.expm1(-k), 1.0)
    # what the integral makes of r and r^2
    r1 = 1 + np.expm1(-k) / some
    r2 = 1 - 2 * r1 / some
    line = r1 if kind == "heun" else np.where(past.three, r1, c / 2)
    b0, b1, b2 = past.spread(line, r2 if corrected else r2 / 2)
    s = v * np.sqrt(-np.expm1(-2 * eta * h))
    return table_of(u, a=(v / u) ** (1 + eta), b0=c + b0, b1=b1, b2=b2, s=s, q=1.0, eta=float(eta > 0))


def dpmpp_2m(levels: Levels) -> Table:
    """y' = (v/u) y + (1 - v/u) ((1 + w) x0 - w h1), w = h/(2 h_before), h = log(u/v), h1 = x0 of the row before.

    DPM-Solver++(2M), Lu 2022, algorithm 2; first order on the first step, and x' = x0 on the step to clean data.
    """
    return _data(levels, "dpmpp_2m", 0.0, 2, "midpoint")


def dpmpp_3m_sde(levels: Levels, eta: float = 1.0, corrected: bool = False) -> Table:
    """y' = (v/u)^(1 + eta) y + int_0^1 k e^{-k (1 - r)} x0(r) dr + v sqrt(1 - (v/u)^(2 eta)) z, k = (1 + eta) h.

    h = log(u/v), x0(r) the parabola in log u through this row's x0 and those of the two rows before: DPM-Solver++(3M),
    Lu 2022, in the SDE form of k-diffusion. The first two rows have order 1 and 2; x' = x0 on the step to clean data.
    eta: 0 is the ODE, 1 draws the noise of ddpm; more is exact too. From pure noise any eta > 0 has ddpm's limit row.
    corrected: the published method takes half of the parabola's r^2 (its D2 is h^2 x0''/2, which it reads as h^2 x0'')
        and converges with order 2; True takes all of it, order 3.
    Raises ValueError for eta < 0 or infinite, and eta > 0 towards more noise.
    """
    if not 0 <= eta < np.inf:
        raise ValueError(f"eta must be >= 0 and finite, got {eta}; 0 is the ODE, 1 draws as much noise as ddpm")
    return _data(levels, "dpmpp_3m_sde", eta, 3, corrected=corrected)


def dpm_multistep(
    levels: Levels,
    order: int = 2,
    algorithm: str = "dpmsolver++",
    kind: str = "midpoint",
    ends: tuple[int, ...] | None = None,
) -> Table:
    """DPM-Solver and DPM-Solver++ as multistep methods of order 1, 2 or 3 (Lu 2022), with other programs' options.

    algorithm: "dpmsolver++" interpolates x0 (order 2: `dpmpp_2m`; order 3: `dpmpp_3m_sde` with eta = 0), "dpmsolver"
        eps; "sde-" before either draws noise: with ++ that of ddpm, without it a declared table (order 1 or 2) whose
        noise sqrt(u^2 - v^2) is more than the marginals have.
    kind: rows of order 2 by the "midpoint" or by "heun", the exact integral of the line.
    ends: bounds on the orders of the last steps, e.g. (2, 1); None is that below 15 steps and nothing above.
    Raises ValueError for other names and orders, noise towards more noise.
    """
    if order not in (1, 2, 3) or algorithm not in ALGORITHMS or kind not in KINDS:
        raise ValueError(
            f"dpm_multistep: order={order!r}, algorithm={algorithm!r}, kind={kind!r}; accepted: 1, 2, 3; "
            f"{', '.join(ALGORITHMS)}; {', '.join(KINDS)}"
        )
    if ends is None:
        ends = (2, 1) if len(levels.u) - 1 < SHORT else ()
    sde = algorithm.startswith("sde-")
    if algorithm.endswith("++"):
        return _data(levels, "dpm_multistep", float(sde), order, kind, ends)
    if sde and order == 3:
        raise ValueError("dpm_multistep: sde-dpmsolver has no order 3; take order=2, or algorithm='sde-dpmsolver++'")
    return _eps(levels, sde, order, kind, ends)


def _eps(levels: Levels, sde: bool, order: int, kind: str, ends: tuple[int, ...]) -> Table:
    """y' = y - int eps du over the step, eps(r) from the past; the SDE takes it twice and adds sqrt(u^2 - v^2) z."""
    u, v = steps_of(levels, "dpm_multistep with sde-dpmsolver" if sde else "dpm_multistep", noise=sde)
    past = _past(u, v, order, ends)
    some = np.where(past.h != 0, past.h, 1.0)
    # int du, and what it makes of r and of r^2/2
    whole = u - v
    r1 = np.where(past.h != 0, whole / some - v, 0.0)
    r2 = np.where(past.h != 0, r1 / some - v / 2, 0.0)
    line = r1 if kind == "heun" else np.where(past.three, r1, whole / 2)
    times = 2 if sde else 1
    e0, e1, e2 = (times * e for e in past.spread(line, r2))
    s = np.sqrt((u - v) * (u + v)) if sde else 0.0
    # a = 1 - (times whole + e0)/u, with v/u to its last digit
    a, b0 = (2 * v - u if sde else v) - e0, times * whole + e0
    table = table_of(u, a=a / u, b0=b0 / u, b1=-e1, b2=-e2, s=s, p=1 / u, q=-1 / u, eta=float(sde))
    if not sde:
        return table
    alpha = levels.alpha[1:]
    return table._replace(declared=np.stack([alpha, alpha * (2 * v - u), (alpha * s) ** 2], axis=1))


_ADAMS = ((1.0,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))


def plms(levels: Levels, order: int = 4, twice: bool = True, clipped_direction: bool = True) -> Table:
    """y' = y + (v - u) sum_j w_j eps_j, eps_j of this row and up to three before: Adams-Bashforth's weights.

    Liu 2022 (PNDM), eq. 9 and 12, as a linear multistep method; the weights take the steps as equal, so that the order
    is 2 at most, and 1 on uneven grids. The first rows have what history there is.
    twice: the first step calls the network at both of its ends (Heun's), in two rows, as latent-diffusion does.
    clipped_direction: as in `ddim`; False keeps more digits of a network that predicts eps.
    Raises ValueError for another order than 1 to 4.
    """
    if order not in (1, 2, 3, 4):
        raise ValueError(f"plms: order={order!r}; accepted: 1, 2, 3, 4")
    u, v = steps_of(levels, "plms")
    w = np.zeros((len(u), 4))
    for k in range(len(u)):
        weights = _ADAMS[min(k, order - 1)]
        w[k, : len(weights)] = weights
    e = (u - v)[:, None] * w
    a, b0, be = _towards(u, v, w[:, 0], clipped_direction)
    table = table_of(u, a=a, b0=b0, be=be, p=1 / u, q=-1 / u)
    table.coef[:, 3:6] = -e[:, 1:]
    if not twice or len(u) < 2 or order == 1:
        return table
    # y_v = y + (v - u) eps_u, then y_v + (v - u)(eps_v - eps_u)/2, which is not remembered
    half, one = (u[:1] - v[:1]) / 2, v[:1]
    a, b0, be = _towards(one, one - half, np.ones(1), clipped_direction)
    stage = table_of(one, a=a, b0=b0, be=be, b1=half)

    def insert(a: Array, b: Array) -> Array:
        return np.concatenate([a[:1], b, a[1:]])

    end = insert(table.end, stage.end)
    end[0] = 0.0
    return Table(insert(table.u, stage.u), insert(table.coef, stage.coef), insert(table.hist, stage.hist), end)


def _towards(u: Array, v: Array, w: Array, clipped: bool) -> tuple[Array, Array, Array]:
    """y + (v - u) w eps as a, b0, be: eps = (y - x0)/u from the clipped x0, or the network's own with x0 beside it."""
    if not clipped:
        return np.zeros_like(u), np.ones_like(u), u * (1 - w) + v * w
    # v/u to its last digit where w is 1
    return (u * (1 - w) + v * w) / u, (u - v) * w / u, np.zeros_like(u)
