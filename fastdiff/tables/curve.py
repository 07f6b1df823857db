"""What a schedule is: x_t = alpha(t) x0 + sigma(t) eps with u = sigma/alpha increasing in t; and how to make your own.

Discrete schedules are variance preserving and know t = 0..T-1; t = -1 is clean data, and a fractional t lies between
its neighbours with log u linear. Continuous schedules have t in [0, t_max] with t = 0 clean. alpha^2 is Ho's alpha_bar.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Curve = Callable[[Array], Array]


class Schedule(NamedTuple):
    """How much signal and noise there is at time t. Build a named one, or your own with `schedule`."""

    name: str
    alpha: Curve
    sigma: Curve
    inverse: Curve
    """u -> t; a discrete schedule clips to [0, T-1]."""
    T: int | None
    """Number of steps; None is a continuous schedule."""
    t_max: float
    t_end: float
    """Last noisy time of a grid: 0 is the first step of a discrete schedule, or clean data of a continuous one."""
    prior: float | None
    """Standard deviation of x_T; None is the first row's SIGMA."""
    told: Curve
    """t -> what the network is told as time."""
    spec: dict[str, Any] | None
    """JSON-able arguments for `from_spec`; None for a schedule of the user's own."""


def ratio(sigma: Array, alpha: Array) -> Array:
    """u = sigma/alpha, inf where alpha = 0."""
    return np.divide(sigma, alpha, out=np.full_like(sigma, np.inf), where=alpha > 0)


def schedule(
    alpha: Curve,
    sigma: Curve,
    *,
    T: int | None = None,
    inverse: Curve | None = None,
    t_max: float = 1.0,
    t_end: float = 0.0,
    prior: float | None = 1.0,
    told: Curve | None = None,
    name: str = "custom",
) -> Schedule:
    """A schedule of your own from alpha(t) and sigma(t), functions of float64 arrays with u = sigma/alpha increasing.

    T: number of steps of a discrete one (alpha and sigma are then read at 0..T-1, and must be variance preserving).
    inverse: u -> t; None finds it by bisection. The other arguments are the fields of `Schedule`.
    Raises ValueError when u does not increase or a discrete one is not variance preserving.
    """
    if T is not None:
        steps = np.arange(T, dtype=np.float64)
        return discrete(name, np.asarray(alpha(steps), np.float64), np.asarray(sigma(steps), np.float64), None, told)
    probe = np.linspace(0, t_max, 65)
    if not (np.diff(ratio(_eval(sigma, probe), _eval(alpha, probe))) > 0).all():
        raise ValueError(f"schedule {name!r}: u = sigma/alpha must increase from t = 0 to t_max = {t_max:g}")
    inverse = inverse or _bisection(alpha, sigma, t_max)
    own = continuous(name, lambda t: _eval(alpha, t), lambda t: _eval(sigma, t), inverse, None)
    return own._replace(t_max=float(t_max), t_end=float(t_end), prior=prior, told=told or same)


def continuous(name: str, alpha: Curve, sigma: Curve, inverse: Curve, spec: dict[str, Any] | None) -> Schedule:
    """A schedule over t in [0, 1] that ends at clean data and starts at unit variance."""
    return Schedule(name, alpha, sigma, inverse, None, 1.0, 0.0, 1.0, same, spec)


def _eval(curve: Curve, t: Array) -> Array:
    t = np.asarray(t, dtype=np.float64)
    return np.array(np.broadcast_to(np.asarray(curve(t), dtype=np.float64), t.shape))


def same(t: Array) -> Array:
    """t itself, as float64."""
    return np.asarray(t, dtype=np.float64)


def _bisection(alpha: Curve, sigma: Curve, t_max: float) -> Curve:
    def u_of(t: Array) -> Array:
        return ratio(_eval(sigma, t), _eval(alpha, t))

    def inverse(u: Array) -> Array:
        u = np.asarray(u, dtype=np.float64)
        low, high = np.zeros_like(u), np.full_like(u, t_max)
        for _ in range(64):
            middle = (low + high) / 2
            below = u_of(middle) < u
            low, high = np.where(below, middle, low), np.where(below, high, middle)
        middle = (low + high) / 2
        first, last = u_of(np.zeros(1))[0], u_of(np.full(1, t_max))[0]
        return np.where(u <= first, 0.0, np.where(u >= last, t_max, middle))

    return inverse


def discrete(
    name: str, alphas: Array, sigmas: Array, spec: dict[str, Any] | None, told: Curve | None = None
) -> Schedule:
    """A variance preserving schedule from its numbers at t = 0..T-1, (T,) each."""
    T = len(alphas)
    if not np.allclose(alphas**2 + sigmas**2, 1, rtol=0, atol=1e-5):
        raise ValueError(f"schedule {name!r}: a discrete schedule needs alpha^2 + sigma^2 = 1; use T=None for others")
    own = ratio(sigmas, alphas)
    if not (own > 0).all() or not (np.diff(own) > 0).all():
        raise ValueError(f"schedule {name!r}: u = sigma/alpha must be positive and increase with t")
    log_u = np.log(own)
    gap = np.append(np.diff(log_u), 0.0)

    def split(t: Array) -> tuple[Array, npt.NDArray[np.int64], Array]:
        t = np.asarray(t, dtype=np.float64)
        if not ((t == -1) | ((t >= 0) & (t <= T - 1))).all():
            raise ValueError(f"t of schedule {name!r} is -1 (clean) or within 0..{T - 1}, got {np.atleast_1d(t)[:8]}")
        i = np.maximum(np.floor(t), 0).astype(np.int64)
        part = np.maximum(t, 0) - i
        # the gap to a last level of u = inf is inf, and 0 inf is no number
        return t, i, np.exp(log_u[i] + part * np.where(part > 0, gap[i], 0))

    def alpha(t: Array) -> Array:
        t, i, u = split(t)
        return np.where(t < 0, 1.0, np.where(t == i, alphas[i], 1 / np.hypot(1, u)))

    def sigma(t: Array) -> Array:
        t, i, u = split(t)
        return np.where(t < 0, 0.0, np.where(t == i, sigmas[i], noise_share(u)))

    def inverse(u: Array) -> Array:
        with np.errstate(divide="ignore"):
            return np.asarray(np.interp(np.log(u), log_u, np.arange(T, dtype=np.float64)), dtype=np.float64)

    return Schedule(name, alpha, sigma, inverse, T, float(T - 1), 0.0, 1.0, told or _from_zero, spec)


def noise_share(u: Array) -> Array:
    """sigma = u/sqrt(1 + u^2) of a variance preserving schedule, 1 at u = inf."""
    return 1 / np.hypot(1, np.divide(1, u, out=np.full_like(u, np.inf), where=u > 0))


def _from_zero(t: Array) -> Array:
    return np.maximum(np.asarray(t, dtype=np.float64), 0.0)
