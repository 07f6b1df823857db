"""Solvers: each a pure function from noise levels to the numbers of a table; no tensor, no network, no loop over them.

A row works on y = x/alpha, where y = x0 + u eps and u = sigma/alpha, and h_j is what was remembered j rows ago:

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


def _table(
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
    def columns(*parts: npt.ArrayLike) -> Array:
        return np.stack([np.broadcast_to(np.asarray(part, np.float64), u.shape) for part in parts], axis=1)

    return Table(u, columns(a, b0, be, b1, b2, 0.0, s), columns(p, q), columns(end)[:, 0], eta)


def _steps(levels: Levels, solver: str, *, noise: bool = False) -> tuple[Array, Array]:
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


def ddpm(levels: Levels, variance: str = "beta_tilde") -> Table:
    """x_s = alpha_s beta/sigma_t^2 x0 + a sigma_s^2/sigma_t^2 x_t + sqrt(variance) z (Ho 2020, eq. 6-7).

    a = alpha_t/alpha_s, beta = sigma_t^2 - a^2 sigma_s^2 (1 - a^2 when variance preserving), between the grid's levels.
    variance: "beta_tilde" = beta sigma_s^2/sigma_t^2, "beta", or "learned_range": log-linear between the two by the
        network's second output (Nichol & Dhariwal 2021, eq. 15). The step to clean data draws no noise.
    Raises ValueError for another name and on grids that run towards more noise.
    """
    u, v = _steps(levels, "ddpm", noise=True)
    a = (v / u) ** 2
    b0 = (u - v) * (u + v) / u**2
    drawn = np.sqrt((u - v) * (u + v))
    if variance == "beta_tilde":
        return _table(u, a=a, b0=b0, s=v / u * drawn, eta=1.0)
    declared = _ho(levels)
    if variance == "beta":
        s = np.where(v > 0, levels.alpha[:-1] / levels.alpha[1:] * drawn, 0.0)
        return _table(u, a=a, b0=b0, s=s, eta=1.0)._replace(declared=declared)
    if variance != "learned_range":
        raise ValueError(f'variance={variance!r} of ddpm is not one of "beta_tilde", "beta", "learned_range"')
    table = _table(u, a=a, b0=b0, s=np.where((v > 0) & (v < u), 1.0, 0.0), eta=1.0)
    return table._replace(variance=_log_range(levels, drawn), declared=declared)


def _ho(levels: Levels) -> Array:
    """The declaration of one DDPM step with variance beta, in the letters of Ho 2020."""
    abar, bbar = levels.alpha**2, levels.sigma**2
    a_t, bar_t, bar_s = abar[:-1] / abar[1:], bbar[:-1], bbar[1:]
    beta = bar_t - a_t * bar_s
    x0, x_t = np.sqrt(abar[1:]) * beta / bar_t, np.sqrt(a_t) * bar_s / bar_t
    signal = x0 + x_t * np.sqrt(abar[:-1])
    return np.stack([signal, x_t * np.sqrt(bar_t), np.where(bar_s > 0, beta, 0.0)], axis=1)


def _log_range(levels: Levels, drawn: Array) -> Array:
    """V0 = log beta_tilde, V1 = log beta."""
    u, v = levels.u[:-1], levels.u[1:]
    out = np.zeros((len(u), 4))
    # a step between equal levels draws nothing and keeps 0
    some = drawn > 0
    out[some, 1] = 2 * np.log(levels.alpha[:-1][some] * drawn[some])
    noisy = some & (v > 0)
    out[noisy, 0] = out[noisy, 1] + 2 * np.log(levels.sigma[1:][noisy] / levels.sigma[:-1][noisy])
    # beta_tilde is 0 on the step to clean data, where the original takes its neighbour's
    for k in np.flatnonzero(some & (v == 0)):
        out[k, 0] = out[k - 1, 0] if k > 0 else out[k, 1]
    return out


def ddim(levels: Levels, eta: float = 0.0, clipped_direction: bool = True) -> Table:
    """x_s = alpha_s x0 + sqrt(sigma_s^2 - d^2) eps + d z, d = eta sigma_s/sigma_t sqrt(1 - alpha_t^2/alpha_s^2).

    Song 2021 (DDIM), eq. 12 and 16; eta = 1 is DDPM. In u, for any schedule: d = eta alpha_s v sqrt(u^2 - v^2)/u.
    clipped_direction: True takes eps from the clipped x0; False (diffusers' default) from the network as it is. They
        differ where `clip` acts.
    Raises ValueError for eta < 0, eta too large for a level, and eta > 0 towards more noise.
    """
    if not eta >= 0:
        raise ValueError(f"eta must be >= 0, got {eta}; 0 is deterministic DDIM, 1 is DDPM")
    u, v = _steps(levels, f"ddim with eta={eta:g}" if eta > 0 else "ddim", noise=eta > 0)
    # relative to v: d = v up, and down^2 + up^2 = 1
    up = eta * np.sqrt(np.maximum((u - v) * (u + v), 0)) / u
    if (up > 1).any():
        raise ValueError(f"eta={eta} draws more noise than the level u = {v[np.argmax(up)]:g} has; use eta <= 1")
    down = v * np.sqrt((1 - up) * (1 + up))
    if clipped_direction:
        return _table(u, a=down / u, b0=(u - down) / u, s=v * up, eta=eta)
    return _table(u, a=0.0, b0=1.0, be=down, s=v * up, eta=eta)


class _Churn(NamedTuple):
    hat: Array  # (n,) level after the added noise
    kick: Array  # (n,) noise that the row into the next level adds
    into: Array  # (n,) alpha of the level that the step's last row hands on


def _churn(levels: Levels, solver: str, churn: float, s_min: float, s_max: float) -> _Churn:
    """u_hat = u (1 + gamma), gamma = min(churn/n, sqrt(2) - 1) where s_min <= u <= s_max (Karras 2022, algorithm 2)."""
    if not churn >= 0:
        raise ValueError(f"churn must be >= 0, got {churn}; 0 is deterministic")
    u, _ = _steps(levels, f"{solver} with churn={churn:g}" if churn > 0 else solver, noise=churn > 0)
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
    table = _table(u, a=v / u, b0=(u - v) / u, s=s_noise * c.kick)
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
    first = _table(u, a=v / u, b0=(u - v) / u, p=(u + v) / (2 * u), q=-half / u, end=last)
    second = _table(v, a=half / some, b0=-half / some, b1=1.0, s=s_noise * c.kick)
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


def dpmpp_2m(levels: Levels) -> Table:
    """y' = (v/u) y + (1 - v/u) ((1 + w) x0 - w h1), w = h/(2 h_before), h = log(u/v), h1 = x0 of the row before.

    DPM-Solver++(2M), Lu 2022, algorithm 2; first order on the first step, and x' = x0 on the step to clean data.
    """
    u, v = _steps(levels, "dpmpp_2m")
    h, before, _ = _log_steps(u, v)
    w = np.divide(h, 2 * before, out=np.zeros_like(h), where=(before != 0) & (v > 0))
    c = (u - v) / u
    return _table(u, a=v / u, b0=c * (1 + w), b1=-c * w, q=1.0)


def _log_steps(u: Array, v: Array) -> tuple[Array, Array, Array]:
    """h = log(u/v), 0 on the step to clean data, and the h of one and two steps before, 0 where there is none."""
    h = np.log(u / np.where(v > 0, v, u))
    return h, np.append(0.0, h)[: len(h)], np.append([0.0, 0.0], h)[: len(h)]


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
    u, v = _steps(levels, f"dpmpp_3m_sde with eta={eta:g}" if eta > 0 else "dpmpp_3m_sde", noise=eta > 0)
    h, h1, h2 = _log_steps(u, v)
    # a parabola needs three levels in a row, a line two
    two, three = h1 != 0, h1 * h2 > 0
    d1, d2, span = np.where(two, h1, 1.0), np.where(three, h2, 1.0), np.where(three, h1 + h2, 1.0)
    k = (1 + eta) * h
    some = np.where(h != 0, k, 1.0)
    # what the integral makes of r and r^2
    r1 = 1 + np.expm1(-k) / some
    r2 = 1 - 2 * r1 / some
    # weights of Newton's divided differences
    line = two * r1 * h
    parabola = three * (r1 * h * h1 + (1.0 if corrected else 0.5) * r2 * h**2) / span
    slope, bend = (line + parabola) / d1, parabola / d2
    c = np.where(v > 0, -np.expm1(-k), 1.0)
    s = v * np.sqrt(-np.expm1(-2 * eta * h))
    a = (v / u) ** (1 + eta)
    return _table(u, a=a, b0=c + slope, b1=-slope - bend, b2=bend, s=s, q=1.0, eta=float(eta > 0))


SOLVERS: dict[str, Solver] = {f.__name__: f for f in (ddim, ddpm, euler, heun, dpmpp_2m, dpmpp_3m_sde)}
