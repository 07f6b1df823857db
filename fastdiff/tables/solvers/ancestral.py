"""DDPM and DDIM: one step from level to level, with noise from none to the whole of the posterior's."""

from __future__ import annotations

import numpy as np

from fastdiff.tables.curve import Array
from fastdiff.tables.grid import Levels
from fastdiff.tables.solvers.table import Table, steps_of, table_of


def ddpm(levels: Levels, variance: str = "beta_tilde") -> Table:
    """x_s = alpha_s beta/sigma_t^2 x0 + a sigma_s^2/sigma_t^2 x_t + sqrt(variance) z (Ho 2020, eq. 6-7).

    a = alpha_t/alpha_s, beta = sigma_t^2 - a^2 sigma_s^2 (1 - a^2 when variance preserving), between the grid's levels.
    variance: "beta_tilde" = beta sigma_s^2/sigma_t^2, "beta", or "learned_range": log-linear between the two by the
        network's second output (Nichol & Dhariwal 2021, eq. 15). The step to clean data draws no noise.
    Raises ValueError for another name and on grids that run towards more noise.
    """
    u, v = steps_of(levels, "ddpm", noise=True)
    a = (v / u) ** 2
    b0 = (u - v) * (u + v) / u**2
    drawn = np.sqrt((u - v) * (u + v))
    if variance == "beta_tilde":
        return table_of(u, a=a, b0=b0, s=v / u * drawn, eta=1.0)
    declared = _ho(levels)
    if variance == "beta":
        s = np.where(v > 0, levels.alpha[:-1] / levels.alpha[1:] * drawn, 0.0)
        return table_of(u, a=a, b0=b0, s=s, eta=1.0)._replace(declared=declared)
    if variance != "learned_range":
        raise ValueError(f'variance={variance!r} of ddpm is not one of "beta_tilde", "beta", "learned_range"')
    table = table_of(u, a=a, b0=b0, s=np.where((v > 0) & (v < u), 1.0, 0.0), eta=1.0)
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
    u, v = steps_of(levels, f"ddim with eta={eta:g}" if eta > 0 else "ddim", noise=eta > 0)
    # relative to v: d = v up, and down^2 + up^2 = 1
    up = eta * np.sqrt(np.maximum((u - v) * (u + v), 0)) / u
    if (up > 1).any():
        raise ValueError(f"eta={eta} draws more noise than the level u = {v[np.argmax(up)]:g} has; use eta <= 1")
    down = v * np.sqrt((1 - up) * (1 + up))
    if clipped_direction:
        return table_of(u, a=down / u, b0=(u - down) / u, s=v * up, eta=eta)
    return table_of(u, a=0.0, b0=1.0, be=down, s=v * up, eta=eta)


def euler_ancestral(levels: Levels, eta: float = 1.0) -> Table:
    """Euler from u to sqrt(v^2 - d^2), then noise d = eta v sqrt(u^2 - v^2)/u: k-diffusion's ancestral sampler.

    That is `ddim` with this eta; only its state is usually written as y = x/alpha. Options and errors as there.
    """
    return ddim(levels, eta)
