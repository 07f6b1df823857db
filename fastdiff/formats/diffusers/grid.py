"""The grids that diffusers' schedulers step over: what the network is told, and the level u = sigma/alpha there."""

from __future__ import annotations

from collections.abc import Sequence
from math import lgamma
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fastdiff.formats.diffusers.config import Reading
from fastdiff.tables.grid import Levels, levels, levels_of_u, times, trailing
from fastdiff.tables.schedule import Array, Schedule

STAGES = ("HeunDiscreteScheduler", "PNDMScheduler")
"""Classes that list a time twice where a step calls the network twice."""
IN_ALPHA = ("DDPMScheduler", "DDIMScheduler", "PNDMScheduler")
"""Classes that step from one of the schedule's own times to the next; the others step over sigma = u."""


class Laid(NamedTuple):
    """A grid of n steps: n network calls, or more where steps have stages."""

    levels: Levels
    """(n + 1,)"""
    step: npt.NDArray[np.int64]
    """(calls,) the level, by number, that each call evaluates at."""
    starts: npt.NDArray[np.bool_]
    """(calls,) whether the call begins a step."""


def lay(
    reading: Reading, n: int | None, timesteps: Sequence[float] | None = None, sigmas: Sequence[float] | None = None
) -> Laid:
    """The grid of n steps, or of given times, or of given levels u with the last one included.

    Raises ValueError for more than one of them or none, and what the class cannot do with them.
    """
    if sum(given is not None for given in (n, timesteps, sigmas)) != 1:
        raise ValueError(
            f"set_timesteps takes one of num_inference_steps={n}, timesteps={timesteps} and sigmas={sigmas}; leave out "
            "the others"
        )
    if n is not None and (isinstance(n, bool) or int(n) != n or n < 1):
        raise ValueError(f"num_inference_steps={n!r} is no number of steps; pass a whole number >= 1")
    if timesteps is not None:
        _descending("timesteps", timesteps, reading.schedule.t_max)
    grid = (
        _in_alpha(reading, n, timesteps, sigmas) if reading.name in IN_ALPHA else _in_u(reading, n, timesteps, sigmas)
    )
    count = len(grid.t) - 1
    twice = {"HeunDiscreteScheduler": slice(1, None), "PNDMScheduler": slice(1, 2)}.get(reading.name, slice(0, 0))
    repeats = np.ones(count, dtype=np.int64)
    repeats[twice] = 2
    step = np.repeat(np.arange(count), repeats)
    # of two calls at one level the first is the stage of the step before
    starts = np.ones(len(step), dtype=bool)
    starts[:-1][step[:-1] == step[1:]] = False
    return Laid(grid, step, starts)


def all_times(reading: Reading) -> Laid:
    """Every time of the schedule, one call each: what a scheduler has before it is told a number of steps."""
    T = reading.schedule.T
    assert T is not None
    t = np.arange(T - 1.0, -2.0, -1.0)
    if reading.name in IN_ALPHA:
        t[-1] = -1.0 if reading.keys.get("set_alpha_to_one", True) else 0.0
        grid = levels(reading.schedule, t)
    else:
        grid = levels_of_u(reading.schedule, np.append(_own_u(reading.schedule)[::-1], 0.0), t)
    return Laid(grid, np.arange(T), np.ones(T, dtype=bool))


def relaid(reading: Reading, t: Array, u: Array, step: npt.NDArray[np.int64], starts: npt.NDArray[np.bool_]) -> Laid:
    """A grid from the numbers of another one."""
    grid = levels(reading.schedule, t) if reading.name in IN_ALPHA else levels_of_u(reading.schedule, u, t)
    return Laid(grid, step, starts)


def index_in(told: Array, value: float, second: bool) -> int:
    """Where `value` is in the times that the network is told; of two places the second, where a step begins.

    Raises ValueError where it is not.
    """
    places = np.flatnonzero(told == value)
    if len(places) == 0:
        raise ValueError(
            f"step: timestep={value:g} is not on the grid of {len(told)} calls from {told[0]:g} to {told[-1]:g}; pass "
            "one of scheduler.timesteps, or set_timesteps(timesteps=...) with times of yours"
        )
    return int(places[1 if second and len(places) > 1 else 0])


def _descending(name: str, values: Sequence[float], largest: float) -> None:
    v = np.array(values, dtype=np.float64)
    if v.ndim != 1 or v.size == 0 or not ((v >= 0) & (v <= largest)).all() or not (np.diff(v) < 0).all():
        raise ValueError(f"{name}={values!r} must fall from at most {largest:g} to at least 0; sort them, once each")


def _in_alpha(reading: Reading, n: int | None, timesteps: Any, sigmas: Any) -> Levels:
    """The schedule's own whole times, the last step to clean data or to t = 0."""
    c, schedule = reading.keys, reading.schedule
    if sigmas is not None or (timesteps is not None and reading.name == "PNDMScheduler"):
        which = "timesteps" if sigmas is None else "sigmas"
        raise ValueError(f"set_timesteps: {reading.name} takes no {which} of one's own; pass num_inference_steps")
    final = "zero" if c.get("set_alpha_to_one", True) else "first"
    if timesteps is not None:
        return levels(schedule, [*np.rint(timesteps), -1.0 if final == "zero" else 0.0])
    return levels(schedule, times(schedule, n, c["timestep_spacing"], final=final, steps_offset=c["steps_offset"]))


def _in_u(reading: Reading, n: int | None, timesteps: Any, sigmas: Any) -> Levels:
    c, schedule = reading.keys, reading.schedule
    own = _own_u(schedule)
    multistep = reading.name == "DPMSolverMultistepScheduler"
    ramp = _ramp(c)
    if timesteps is not None and ramp:
        raise ValueError(f"set_timesteps: timesteps and {ramp}=True both choose the levels; leave out one")
    if sigmas is not None:
        if reading.name != "EulerDiscreteScheduler":
            raise ValueError(f"set_timesteps: {reading.name} takes no sigmas of one's own; pass num_inference_steps")
        u = np.array(sigmas, dtype=np.float64)
        _descending("sigmas", sigmas, np.inf)
        t = schedule.inverse(u[:-1])
    else:
        if timesteps is None:
            assert n is not None
            t = _multistep_times(c, own, n) if multistep else _spaced(c, n)
        else:
            t = np.array(timesteps, dtype=np.float64)
        if ramp:
            first, last = (own[-1], own[0]) if multistep else _interpolated(own, t[[0, -1]])
            high, low = _or(c.get("sigma_max"), first), _or(c.get("sigma_min"), last)
            u = _RAMPS[ramp](high, low, len(t))
            # a power and its root do not come back exactly, and the next level may be this one
            u[-1] = low if len(u) > 1 else high
            t = schedule.inverse(u)
            if multistep and ramp in _ROUNDED and c["beta_schedule"] != "squaredcos_cap_v2":
                t = np.rint(t)
        else:
            u = _interpolated(own, t)
        u = np.append(u, own[0] if c.get("final_sigmas_type") == "sigma_min" else 0.0)
    if multistep:
        t = np.floor(t)
    if c.get("timestep_type") == "continuous" and reading.predicts == "v":
        t = np.log(u[:-1]) / 4
    return levels_of_u(schedule, u, np.append(t, 0.0))


def _or(given: float | None, otherwise: float) -> float:
    return otherwise if given is None else given


def _own_u(schedule: Schedule) -> Array:
    assert schedule.T is not None
    t = np.arange(schedule.T, dtype=np.float64)
    alpha = schedule.alpha(t)
    if alpha[-1] == 0:
        # sigmas must be finite: diffusers takes half precision's smallest number for alpha^2
        alpha[-1] = 2.0**-12
        return np.append(schedule.sigma(t[:-1]) / alpha[:-1], np.sqrt(1 - alpha[-1] ** 2) / alpha[-1])
    return np.asarray(schedule.sigma(t) / alpha)


def _interpolated(own: Array, t: Array) -> Array:
    """u linear in t between the schedule's own, where ours is linear in log u."""
    return np.asarray(np.interp(t, np.arange(len(own)), own))


def _spaced(c: dict[str, Any], n: int) -> Array:
    """linspace is not rounded here: the network is told fractions."""
    T, spacing = c["num_train_timesteps"], c["timestep_spacing"]
    if spacing == "linspace":
        return np.linspace(0, T - 1, n)[::-1]
    if n > T:
        raise ValueError(f"num_inference_steps={n} exceeds num_train_timesteps={T} for {spacing!r}; take at most {T}")
    if spacing == "leading":
        return np.asarray((np.arange(n) * (T // n))[::-1] + float(c["steps_offset"]))
    return trailing(T, n, T)


def _multistep_times(c: dict[str, Any], own: Array, n: int) -> Array:
    """DPMSolverMultistep counts one more step for leading and linspace and leaves out the last."""
    T, spacing = c["num_train_timesteps"], c["timestep_spacing"]
    last = T - int(np.searchsorted(-np.log(own)[::-1], c["lambda_min_clipped"]))
    if spacing == "linspace":
        return np.asarray(np.round(np.linspace(0, last - 1, n + 1))[::-1][:-1], np.float64)
    if spacing == "leading":
        if n >= last:
            raise ValueError(f"num_inference_steps={n} leaves no room between {last} times; take at most {last - 1}")
        return np.asarray((np.arange(n + 1) * (last // (n + 1)))[::-1][:-1] + float(c["steps_offset"]))
    if n > T:
        raise ValueError(f"num_inference_steps={n} exceeds num_train_timesteps={T} for 'trailing'; take at most {T}")
    found = trailing(T, n, last)
    return found[found >= 0]


def _ramp(c: dict[str, Any]) -> str | None:
    return next((key for key in _RAMPS if c.get(key)), None)


def _karras(high: float, low: float, n: int) -> Array:
    """Karras 2022, eq. 5, with rho = 7."""
    return np.asarray((high ** (1 / 7) + np.linspace(0, 1, n) * (low ** (1 / 7) - high ** (1 / 7))) ** 7)


def _exponential(high: float, low: float, n: int) -> Array:
    return np.asarray(np.exp(np.linspace(np.log(high), np.log(low), n)))


def _beta(high: float, low: float, n: int) -> Array:
    """Levels at the quantiles of Beta(0.6, 0.6) (Lee 2024)."""
    return low + beta_quantile(1 - np.linspace(0, 1, n), 0.6) * (high - low)


# lu: uniform in log u, which is exponential
_RAMPS = {
    "use_karras_sigmas": _karras,
    "use_lu_lambdas": _exponential,
    "use_exponential_sigmas": _exponential,
    "use_beta_sigmas": _beta,
}
_ROUNDED = ("use_karras_sigmas", "use_lu_lambdas")


def beta_quantile(p: Array, a: float) -> Array:
    """x with I_x(a, a) = p, the regularised incomplete beta function, to the last digits; a < 1.

    I_x(a, a) = x^a/B sum_n (1 - a)_n x^n/(n! (a + n)), which halves its terms for x <= 1/2; the rest by symmetry.
    """
    n = np.arange(64)
    rising = np.cumprod(np.append(1.0, (n[:-1] + 1 - a) / (n[:-1] + 1))) / (a + n)
    B = np.exp(2 * lgamma(a) - lgamma(2 * a))
    small = np.minimum(p, 1 - p)
    low, high = np.zeros_like(small), np.full_like(small, 0.5)
    for _ in range(64):
        x = (low + high) / 2
        below = x**a / B * (x[:, None] ** n @ rising) < small
        low, high = np.where(below, x, low), np.where(below, high, x)
    x = np.where(small > 0, (low + high) / 2, 0.0)
    return np.where(p <= 0.5, x, 1 - x)
