"""What the network's output F says at x = alpha x0 + sigma eps: x0 = c_skip x + c_out F, eps = e_skip x + e_out F."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from fastdiff.tables.curve import Array

Pair = tuple[Array, Array]

PREDICTS = ("eps", "x0", "v", "flow", "edm", "score", "mean")


def predict(
    kind: str,
    alpha: npt.ArrayLike,
    sigma: npt.ArrayLike,
    *,
    sigma_data: float = 0.5,
    previous: tuple[npt.ArrayLike, npt.ArrayLike] | None = None,
) -> tuple[Array, Array, Array]:
    """c_in, c_skip, c_out: the network sees c_in x, and x0 = c_skip x + c_out F.

    kind: eps; x0; v = alpha eps - sigma x0 (Salimans & Ho 2022); flow = eps - x0 (Liu 2023); edm = Karras 2022,
        table 1, with sigma_data; score = -eps/sigma; mean = the posterior mean of Ho 2020, eq. 7, with previous =
        (alpha, sigma) of the step before (less noise).
    Raises ValueError for an unknown kind, eps or score at alpha = 0, and mean without `previous`.
    """
    alpha, sigma = np.broadcast_arrays(np.asarray(alpha, np.float64), np.asarray(sigma, np.float64))
    c_in = 1 / np.hypot(sigma, alpha * sigma_data) if kind == "edm" else np.ones_like(alpha)
    c_skip, c_out = _x0(kind, alpha, sigma, sigma_data, previous)
    return c_in, c_skip, c_out


def _x0(kind: str, alpha: Array, sigma: Array, sigma_data: float, previous: object) -> Pair:
    if kind in ("eps", "score"):
        if not (alpha > 0).all():
            raise ValueError(f"{kind}-prediction says nothing about x0 at alpha = 0; use a v, x0, flow or edm network")
        return 1 / alpha, (-sigma if kind == "eps" else sigma**2) / alpha
    if kind == "x0":
        return np.zeros_like(alpha), np.ones_like(alpha)
    if kind == "v":
        power = alpha**2 + sigma**2
        return alpha / power, -sigma / power
    if kind == "flow":
        return 1 / (alpha + sigma), -sigma / (alpha + sigma)
    if kind == "edm":
        power = sigma**2 + (alpha * sigma_data) ** 2
        return sigma_data**2 * alpha / power, sigma_data * sigma / np.sqrt(power)
    if kind == "mean":
        a, sigma_s, alpha_s, drawn = _mean(alpha, sigma, previous)
        return -a * sigma_s**2 / (alpha_s * drawn), sigma**2 / (alpha_s * drawn)
    raise ValueError(f"predicts={kind!r} is not one of {', '.join(PREDICTS)}")


def direction(
    kind: str,
    alpha: npt.ArrayLike,
    sigma: npt.ArrayLike,
    *,
    sigma_data: float = 0.5,
    previous: tuple[npt.ArrayLike, npt.ArrayLike] | None = None,
) -> Pair:
    """e_skip, e_out: eps = e_skip x + e_out F, the direction that the unclipped output points in; sigma > 0."""
    alpha, sigma = np.broadcast_arrays(np.asarray(alpha, np.float64), np.asarray(sigma, np.float64))
    if kind in ("eps", "score"):
        return np.zeros_like(alpha), np.ones_like(alpha) if kind == "eps" else -sigma
    if kind == "v":
        power = alpha**2 + sigma**2
        return sigma / power, alpha / power
    if kind == "flow":
        return 1 / (alpha + sigma), alpha / (alpha + sigma)
    if kind == "edm":
        power = sigma**2 + (alpha * sigma_data) ** 2
        return sigma / power, -alpha * sigma_data / np.sqrt(power)
    if kind == "mean":
        _, _, alpha_s, drawn = _mean(alpha, sigma, previous)
        return sigma / drawn, -alpha * sigma / (alpha_s * drawn)
    _, c_out = _x0(kind, alpha, sigma, sigma_data, previous)
    return 1 / sigma, -alpha * c_out / sigma


def _mean(alpha: Array, sigma: Array, previous: object) -> tuple[Array, Array, Array, Array]:
    """a = alpha_t/alpha_s, sigma_s, alpha_s and the variance of q(x_t given x_s), sigma_t^2 - a^2 sigma_s^2."""
    if not isinstance(previous, tuple):
        raise ValueError(
            "predicts='mean' needs previous=(alpha, sigma) of the step before; plan knows it for discrete ones"
        )
    alpha_s, sigma_s = (np.asarray(p, np.float64) for p in previous)
    a = alpha / alpha_s
    return a, sigma_s, alpha_s, (sigma - a * sigma_s) * (sigma + a * sigma_s)
