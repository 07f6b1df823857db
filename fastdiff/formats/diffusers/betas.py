"""The betas of diffusers' schedulers, as schedules in float64 (diffusers' own tables are float32)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from fastdiff.formats.diffusers.refusal import one_of
from fastdiff.tables.schedule import Array, Schedule, cosine, from_betas, linear, scaled_linear


def schedule_of_betas(c: Mapping[str, Any]) -> Schedule:
    """The schedule of num_train_timesteps, beta_start, beta_end, beta_schedule, trained_betas. ValueError else."""
    if c["trained_betas"] is not None:
        return from_betas(c["trained_betas"])
    kinds = ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "exp", "laplace")
    kind = one_of(c, "beta_schedule", *kinds)
    T, first, last = c["num_train_timesteps"], c["beta_start"], c["beta_end"]
    if kind == "squaredcos_cap_v2":
        return cosine(T)
    if kind == "sigmoid":
        # a sigmoid of the betas themselves over -6..6, not the sigmoid of alpha^2 that `tables` has
        return from_betas(first + (last - first) / (1 + np.exp(-np.linspace(-6, 6, T))))
    if kind == "exp":
        # alpha_bar = exp(-12 t)
        return from_betas(np.full(T, min(-np.expm1(-12 / T), 0.999)))
    if kind == "laplace":
        return _of_products(T, _laplace)
    return (linear if kind == "linear" else scaled_linear)(T, first, last)


def _of_products(T: int, alpha_bar: Callable[[Array], Array]) -> Schedule:
    """beta_i = 1 - alpha_bar((i + 1)/T)/alpha_bar(i/T), at most 0.999."""
    values = alpha_bar(np.arange(T + 1) / T)
    return from_betas(np.minimum(1 - values[1:] / values[:-1], 0.999))


def _laplace(t: Array) -> Array:
    """sqrt(snr/(1 + snr)), snr = exp(-sign(1/2 - t) log(1 - 2 |1/2 - t| + 1e-6)/2)."""
    middle = 0.5 - t
    snr = np.exp(-0.5 * np.copysign(1.0, middle) * np.log(1 - 2 * np.abs(middle) + 1e-6))
    return np.asarray(np.sqrt(snr / (1 + snr)))
