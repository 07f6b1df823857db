"""The times and noise levels that a solver steps over: spacings under the names that other programs gave them."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from fastdiff.tables.curve import Array, Curve, Schedule, ratio


class Levels(NamedTuple):
    """The noise levels a solver steps over, first to last, each (n+1,); u = sigma/alpha may be inf at the first."""

    t: Array
    alpha: Array
    sigma: Array
    u: Array
    at: Callable[[Array], tuple[Array, Array, Array]]
    """u -> (t, alpha, sigma) off the grid, with sigma = u alpha."""
    snap: Curve
    """u -> the nearest u (in log u) at which the network was trained; the identity unless quantized."""


def levels(schedule: Schedule, times: npt.ArrayLike, quantize: bool = False) -> Levels:
    """alpha, sigma and u = sigma/alpha at `times` (n+1,), the last level included.

    quantize: move every time to the nearest of the schedule's own steps, for networks that know integers only.
    Raises ValueError for fewer than two times, times that the schedule does not have, and quantize without steps.
    """
    t = np.array(times, dtype=np.float64)
    if t.ndim != 1 or t.size < 2 or not np.isfinite(t).all():
        raise ValueError(f"times must be two or more finite numbers in a row, got {times!r}; pass e.g. [999, 499, -1]")
    if quantize and schedule.T is None:
        raise ValueError(
            f"quantize=True needs a discrete schedule, got {schedule.name!r}; leave it out or build with T="
        )
    if schedule.T is None and t.min() < 0:
        raise ValueError(f"times of a continuous schedule are >= 0, got {t.min():g}; clean data is t = 0")
    if quantize:
        # log u is linear in t between neighbours, so the nearest level is the nearest integer
        t = np.rint(t)
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    return Levels(t, alpha, sigma, ratio(sigma, alpha), _at(schedule), _snap(schedule) if quantize else lambda u: u)


def levels_of_u(schedule: Schedule, u: npt.ArrayLike, t: npt.ArrayLike) -> Levels:
    """Levels of a variance preserving schedule at u = sigma/alpha (n+1,), and what the network is told there, any t.

    For grids of other programs, whose levels lie between the schedule's own by rules of theirs.
    """
    u = np.array(u, dtype=np.float64)
    alpha = 1 / np.hypot(1, u)
    return Levels(np.array(t, dtype=np.float64), alpha, u * alpha, u, _at(schedule), lambda u: u)


def _at(schedule: Schedule) -> Callable[[Array], tuple[Array, Array, Array]]:
    def at(u: Array) -> tuple[Array, Array, Array]:
        u = np.asarray(u, dtype=np.float64)
        t = schedule.inverse(u)
        if schedule.T is None:
            alpha = schedule.alpha(t)
            return t, alpha, u * alpha
        # outside [u_0, u_{T-1}] the network is told the nearest step, the state keeps its own u
        alpha = 1 / np.hypot(1, u)
        return np.where(u > 0, t, -1.0), alpha, u * alpha

    return at


def _snap(schedule: Schedule) -> Curve:
    def snap(u: Array) -> Array:
        t = np.rint(schedule.inverse(u))
        return np.where(np.asarray(u) > 0, ratio(schedule.sigma(t), schedule.alpha(t)), 0.0)

    return snap


def times(
    schedule: Schedule,
    steps: int | None,
    spacing: str | Callable[[Schedule, int], npt.ArrayLike] | None = None,
    *,
    final: str = "zero",
    t_end: float | None = None,
    denoise: bool = False,
    steps_offset: int = 0,
) -> Array:
    """The times of `steps` grid intervals, (steps + 1,) float64 from noise to data, the last level included.

    spacing: "trailing", "leading" (+ steps_offset), "linspace" are diffusers' integers, "quad" is DDIM's, "ddim25" and
        "10,15,20" are guided-diffusion's (they bring their own number of steps); "karras" (rho 7), "exponential" and
        "logsnr" are levels of u; "uniform" is linear in t of a continuous schedule; or a function (schedule, steps) ->
        all times, the last one included. None: trailing (discrete), karras (ve, edm), uniform (other continuous).
    final: of a discrete schedule, "zero" ends at clean data (t = -1), "first" at t = 0. For karras and exponential of
        a continuous one, "zero" is `steps` noisy levels and clean data, "first" is `steps + 1` noisy levels.
    t_end: the last noisy time of a continuous schedule; None is the schedule's own. uniform and logsnr end there;
        denoise=True then appends clean data.
    Raises ValueError for steps < 1, more steps than the schedule has, unknown names.
    """
    if final not in ("zero", "first"):
        raise ValueError(f'final must be "zero" (clean data) or "first" (the first noisy step), got {final!r}')
    if t_end is not None and (schedule.T is not None or not 0 <= t_end < schedule.t_max):
        raise ValueError(
            f"t_end is a time of a continuous schedule below {schedule.t_max:g}, got {t_end}; see also final="
        )
    clean = 0.0 if schedule.T is None else -1.0
    if callable(spacing):
        grid = np.array(spacing(schedule, _count(steps)), dtype=np.float64)
    else:
        name = spacing or _default(schedule)
        if schedule.T is not None and name not in IN_U:
            noisy = _integers(schedule.T, steps, name, steps_offset)
            grid = np.append(noisy, clean if final == "zero" else 0.0)
        else:
            grid = _levels_of_u(schedule, _count(steps), name, final, schedule.t_end if t_end is None else t_end)
    return np.append(grid, clean) if denoise and grid[-1] != clean else grid


IN_U = ("karras", "exponential", "logsnr")
IN_STEPS = ("trailing", "leading", "linspace", "quad")


def _default(schedule: Schedule) -> str:
    if schedule.T is not None:
        return "trailing"
    return "karras" if schedule.prior is None else "uniform"


def _count(steps: int | None) -> int:
    if steps is None or isinstance(steps, bool) or int(steps) != steps or steps < 1:
        raise ValueError(f"steps must be a whole number >= 1, got {steps!r}; e.g. steps=50")
    return int(steps)


def _integers(T: int, steps: int | None, name: str, steps_offset: int) -> Array:
    """The n noisy steps of a discrete schedule, first to last."""
    if re.fullmatch(r"ddim\d+|\d+(,\d+)*", name):
        kept = _respaced(T, name)
        if steps is not None and steps != len(kept):
            raise ValueError(f"steps={steps} contradicts spacing={name!r}, which has {len(kept)}; leave steps out")
        return kept
    if name not in IN_STEPS:
        known = ", ".join(IN_STEPS + IN_U)
        raise ValueError(f'spacing {name!r} of a discrete schedule is not one of {known}, "ddim25", "10,15,20"')
    n = _count(steps)
    if n > T:
        raise ValueError(f"steps={n} exceeds the schedule's T={T}; take at most {T}, or spacing='karras'")
    if name == "trailing":
        found = trailing(T, n, T)
    elif name == "leading":
        found = np.arange(n, dtype=np.float64)[::-1] * (T // n) + steps_offset
    elif name == "linspace":
        found = np.round(np.linspace(0, T - 1, n))[::-1]
    else:
        found = np.floor(np.linspace(0, np.sqrt(T * 0.8), n) ** 2)[::-1]
    if found.max() > T - 1:
        raise ValueError(
            f"steps={n} with steps_offset={steps_offset} asks for t={found.max():g} > {T - 1}; lower either"
        )
    return found


def trailing(T: int, n: int, start: int) -> Array:
    """n times from start - 1 down by T/n, rounded as diffusers does, ties included: numpy.arange adds the step rounded.

    It may have one value more than n, and none less.
    """
    return np.asarray(np.round(np.arange(start, 0, -T / n)[:n]) - 1, np.float64)


def _respaced(T: int, name: str) -> Array:
    """guided-diffusion's rule: "ddimN" strides so that N of 0..T-1 stay, "a,b,c" keeps so many of equal sections."""
    if name.startswith("ddim"):
        wanted = int(name[4:])
        for stride in range(1, T + 1):
            if len(range(0, T, stride)) == wanted:
                return np.arange(0, T, stride, dtype=np.float64)[::-1]
        raise ValueError(f'no whole stride keeps {wanted} of {T} steps for spacing={name!r}; use "{wanted}" instead')
    counts = [int(c) for c in name.split(",")]
    size, more = divmod(T, len(counts))
    start = 0
    kept: list[Array] = []
    for i, count in enumerate(counts):
        length = size + (i < more)
        if not 1 <= count <= length:
            raise ValueError(f"section {i} of spacing={name!r} keeps {count} of {length} steps; keep 1 to {length}")
        between = (length - 1) / (count - 1) if count > 1 else 1.0
        # a running sum as in the original: i * between rounds otherwise at ties
        kept.append(start + np.round(np.cumsum([0.0] + [between] * (count - 1))))
        start += length
    return np.concatenate(kept)[::-1]


def _levels_of_u(schedule: Schedule, n: int, name: str, final: str, t_end: float) -> Array:
    if name == "uniform" and schedule.T is None:
        return np.linspace(schedule.t_max, t_end, n + 1)
    if name not in IN_U:
        known = ", ".join(("uniform", *IN_U))
        raise ValueError(f"spacing {name!r} of the continuous schedule {schedule.name!r} is not one of {known}")
    ends = np.array([schedule.t_max, t_end])
    high, low = ratio(schedule.sigma(ends), schedule.alpha(ends))
    if not (np.isfinite(high) and low > 0):
        raise ValueError(
            f"spacing {name!r} needs 0 < u < inf, but u of {schedule.name!r} goes from {high:g} to {low:g}; "
            "pass t_end=1e-3 when it ends at 0, spacing='uniform' when it starts at inf"
        )
    # the clean level follows; logsnr of a continuous schedule and final="first" end on the last noisy one
    follows = schedule.T is not None or (name != "logsnr" and final == "zero")
    part = np.linspace(0, 1, n if follows else n + 1)
    if name == "karras":
        u = (high ** (1 / 7) + part * (low ** (1 / 7) - high ** (1 / 7))) ** 7
    else:
        u = np.exp(np.log(high) + part * (np.log(low) - np.log(high)))
    t = np.array(schedule.inverse(u), dtype=np.float64)
    t[0] = schedule.t_max
    if len(t) > 1:
        t[-1] = t_end
    if not follows:
        return t
    return np.append(t, 0.0 if schedule.T is None or final == "first" else -1.0)
