"""The schedules with a name: x_t = alpha(t) x0 + sigma(t) eps, discrete (t = 0..T-1) or continuous.

What a schedule is, and how to build your own, is in `curve`; times and noise levels are in `grid`. Both are importable
from here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from fastdiff.tables.curve import Array, Curve, Schedule, continuous, discrete, noise_share, same, schedule
from fastdiff.tables.grid import Levels, levels, times

__all__ = ["Array", "Curve", "Levels", "Schedule", "from_spec", "levels", "schedule", "times"]
__all__ += [
    "cosine",
    "edm",
    "flow",
    "from_betas",
    "linear",
    "scaled_linear",
    "sigmoid",
    "sub_vp",
    "ve",
    "vp",
    "zero_snr",
]


def from_betas(betas: Sequence[float] | Array) -> Schedule:
    """alpha^2 = prod (1 - beta), from the variances of the Markov steps (Ho 2020, section 2); betas (T,) in (0, 1)."""
    table = np.array(betas, dtype=np.float64)
    return _betas(table, {"name": "from_betas", "betas": table.tolist()})


def _betas(betas: Array, spec: dict[str, Any]) -> Schedule:
    if betas.ndim != 1 or betas.size == 0 or not ((betas > 0) & (betas < 1)).all():
        bad = betas[~((betas > 0) & (betas < 1))]
        raise ValueError(
            f"betas must be a non-empty row of numbers inside (0, 1), got shape {betas.shape} with {bad[:4]} outside; "
            "for alpha = 0 at the last step build schedule(alpha, sigma, T=T)"
        )
    # through log1p and expm1: 1 - prod (1 - beta) loses four digits at the first steps
    log_bar = np.cumsum(np.log1p(-betas))
    return discrete(str(spec["name"]), np.exp(log_bar / 2), np.sqrt(-np.expm1(log_bar)), spec)


def linear(T: int | None = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> Schedule:
    """beta linear in t (Ho 2020); T=None is `vp` with 1000 times these betas."""
    if T is None:
        return vp(1000 * beta_start, 1000 * beta_end)
    spec = {"name": "linear", "T": T, "beta_start": beta_start, "beta_end": beta_end}
    return _betas(np.linspace(beta_start, beta_end, T), spec)


def scaled_linear(T: int | None = 1000, beta_start: float = 0.00085, beta_end: float = 0.012) -> Schedule:
    """sqrt(beta) linear in t (Rombach 2022); T=None integrates 1000 beta(t) over t in [0, 1]."""
    spec = {"name": "scaled_linear", "T": T, "beta_start": beta_start, "beta_end": beta_end}
    first, last = beta_start**0.5, beta_end**0.5
    if T is not None:
        return _betas(np.linspace(first, last, T) ** 2, spec)
    r, d = (1000 * beta_start) ** 0.5, (1000 * beta_end) ** 0.5 - (1000 * beta_start) ** 0.5

    def solve(B: Array) -> Array:
        # the cubic (r + d t)^3 = r^3 + 3 d B, rationalised so that d = 0 and small B lose nothing
        c = np.cbrt(r**3 + 3 * d * B)
        return np.asarray(3 * B / (c * c + c * r + r * r))

    return _vp("scaled_linear", lambda t: t * (r * r + r * d * t + d * d * t * t / 3), solve, spec)


def cosine(T: int | None = 1000, s: float = 0.008) -> Schedule:
    """alpha_bar_i = f(i+1)/f(0), f(i) = cos^2((i/T + s)/(1 + s) pi/2), beta <= 0.999 (Nichol & Dhariwal 2021).

    T=None is alpha = cos(pi t/2), sigma = sin(pi t/2), without s; alpha is 0 at t = 1.
    """
    if T is None:
        half = np.pi / 2
        return continuous(
            "cosine",
            lambda t: np.sin(half * (1 - np.asarray(t))),  # exactly 0 at t = 1
            lambda t: np.sin(half * np.asarray(t)),
            lambda u: np.arctan(u) / half,
            {"name": "cosine", "T": None},
        )
    angle = (np.arange(T + 1) / T + s) / (1 + s) * (np.pi / 2)
    a, b = angle[:-1], angle[1:]
    # 1 - cos^2 b / cos^2 a without the cancellation
    betas = np.sin(a + b) * np.sin(b - a) / np.cos(a) ** 2
    return _betas(np.minimum(betas, 0.999), {"name": "cosine", "T": T, "s": s})


def sigmoid(T: int | None = 1000, start: float = -3.0, end: float = 3.0, tau: float = 1.0) -> Schedule:
    """alpha^2 = (S(end) - S(z))/(S(end) - S(start)), z = start + t (end - start), S(z) = 1/(1 + e^(-z/tau)); Chen 2023.

    The discrete form takes its betas (<= 0.999) from t = i/T; T=None has alpha = 0 at t = 1.
    """
    z0, z1 = start / tau / 2, end / tau / 2
    if not z0 < z1:
        raise ValueError(f"sigmoid needs start < end and tau > 0, got {start}, {end}, {tau}; the paper has -3, 3, 1")

    def gap(low: Array, high: Array) -> Array:
        # 2 (S(high) - S(low)) = tanh high - tanh low, arguments halved, without the cancellation
        return np.asarray(np.sinh(high - low) / (np.cosh(high) * np.cosh(low)))

    zero, one = np.array(z0), np.array(z1)
    total = gap(zero, one)

    def z(t: Array) -> Array:
        t = np.asarray(t, dtype=np.float64)
        return np.where(t == 1, z1, z0 + t * (z1 - z0))

    def inverse(u: Array) -> Array:
        # tanh z = tanh z0 + r (tanh z1 - tanh z0) with r = sigma^2, as a difference z - z0
        u = np.asarray(u, dtype=np.float64)
        r = np.square(noise_share(u))
        m = r * total * np.cosh(z0)
        return np.where(np.isinf(u), 1.0, np.arctanh(m * np.cosh(z0) / (1 - m * np.sinh(z0))) / (z1 - z0))

    spec = {"name": "sigmoid", "T": T, "start": start, "end": end, "tau": tau}
    if T is not None:
        grid = z(np.arange(T + 1) / T)
        return _betas(np.minimum(gap(grid[:-1], grid[1:]) / gap(grid[:-1], one), 0.999), spec)

    def alpha(t: Array) -> Array:
        return np.sqrt(gap(z(t), one) / total)

    def sigma(t: Array) -> Array:
        return np.sqrt(gap(zero, z(t)) / total)

    return continuous("sigmoid", alpha, sigma, inverse, spec)


def _vp(name: str, B: Curve, solve: Curve, spec: dict[str, Any]) -> Schedule:
    """alpha^2 = exp(-B), sigma^2 = 1 - exp(-B), B(t) the integral of beta; `solve` is B -> t."""
    return continuous(
        name,
        lambda t: np.exp(-B(np.asarray(t)) / 2),
        lambda t: np.sqrt(-np.expm1(-B(np.asarray(t)))),
        lambda u: solve(np.log1p(np.square(u))),
        spec,
    )._replace(t_end=1e-3)


def _integral(beta_min: float, beta_max: float) -> tuple[Curve, Curve]:
    """B(t) = beta_min t + (beta_max - beta_min) t^2/2 and its inverse."""
    d = beta_max - beta_min
    return lambda t: t * (beta_min + d * t / 2), lambda B: 2 * B / (beta_min + np.sqrt(beta_min**2 + 2 * d * B))


def vp(beta_min: float = 0.1, beta_max: float = 20.0) -> Schedule:
    """dx = -beta/2 x dt + sqrt(beta) dw with beta linear in t in [0, 1] (Song 2021, VP)."""
    return _vp("vp", *_integral(beta_min, beta_max), {"name": "vp", "beta_min": beta_min, "beta_max": beta_max})


def sub_vp(beta_min: float = 0.1, beta_max: float = 20.0) -> Schedule:
    """alpha as in `vp`, sigma = 1 - alpha^2 (Song 2021, sub-VP)."""
    B, solve = _integral(beta_min, beta_max)
    spec = {"name": "sub_vp", "beta_min": beta_min, "beta_max": beta_max}
    preserving = _vp("sub_vp", B, solve, spec)
    # u = (1 - alpha^2)/alpha = 2 sinh(B/2)
    return preserving._replace(
        sigma=lambda t: -np.expm1(-B(np.asarray(t))), inverse=lambda u: solve(2 * np.arcsinh(np.asarray(u) / 2))
    )


def _exploding(name: str, low: float, high: float, told: Curve) -> Schedule:
    if not 0 < low < high:
        raise ValueError(f"{name} needs 0 < sigma_min < sigma_max, got {low} and {high}")
    spec = {"name": name, "sigma_min": low, "sigma_max": high}

    def one(t: Array) -> Array:
        return np.ones(np.shape(t))

    return Schedule(name, one, same, same, None, float(high), float(low), None, told, spec)


def ve(sigma_min: float = 0.01, sigma_max: float = 50.0) -> Schedule:
    """alpha = 1 and t = sigma (Song 2021, VE)."""
    return _exploding("ve", sigma_min, sigma_max, same)


def edm(sigma_min: float = 0.002, sigma_max: float = 80.0) -> Schedule:
    """alpha = 1 and t = sigma; the network is told ln(sigma)/4 (Karras 2022, table 1)."""

    def told(t: Array) -> Array:
        with np.errstate(divide="ignore"):
            return np.log(np.asarray(t, dtype=np.float64)) / 4

    return _exploding("edm", sigma_min, sigma_max, told)


def flow() -> Schedule:
    """alpha = 1 - t, sigma = t: the straight line of rectified flow (Liu 2023); alpha is 0 at t = 1."""

    def inverse(u: Array) -> Array:
        # u/(1 + u), 1 at u = inf
        return 1 - 1 / (1 + np.asarray(u, dtype=np.float64))

    return continuous("flow", lambda t: 1 - np.asarray(t, dtype=np.float64), same, inverse, {"name": "flow"})


def zero_snr(of: Schedule | dict[str, Any]) -> Schedule:
    """alpha' = (alpha - alpha_T) alpha_1/(alpha_1 - alpha_T): no signal at the last step (Lin 2024, algorithm 1).

    of: a discrete schedule, or its spec. Raises ValueError for a continuous one.
    """
    old = of if isinstance(of, Schedule) else from_spec(of)
    if old.T is None:
        raise ValueError(f"zero_snr: {old.name!r} is continuous; accepted: a discrete schedule, built with T=")
    alphas = old.alpha(np.arange(old.T, dtype=np.float64))
    alphas = (alphas - alphas[-1]) * (alphas[0] / (alphas[0] - alphas[-1]))
    spec = None if old.spec is None else {"name": "zero_snr", "of": old.spec}
    return discrete("zero_snr", alphas, np.sqrt((1 - alphas) * (1 + alphas)), spec)


NAMED: dict[str, Callable[..., Schedule]] = {
    f.__name__: f for f in (linear, scaled_linear, cosine, sigmoid, from_betas, vp, sub_vp, ve, edm, flow, zero_snr)
}


def from_spec(spec: dict[str, Any]) -> Schedule:
    """The schedule that wrote `spec`, e.g. {"name": "cosine", "T": 1000, "s": 0.008}."""
    options = dict(spec)
    name = options.pop("name", None)
    if name not in NAMED:
        raise ValueError(
            f"schedule {name!r} is not one of {', '.join(NAMED)}; pass a schedule of your own as an object"
        )
    return NAMED[name](**options)
