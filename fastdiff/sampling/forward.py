"""The forward process of a schedule, images to noisy images, and a schedule's numbers as tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastdiff.ops import philox, q_sample as noised
from fastdiff.tables.schedule import Schedule


def host_times(t: Tensor | Sequence[float] | float, n: int) -> np.ndarray[Any, Any]:
    """One time an image, (n,) float64 on the host, from one each or one for all."""
    return np.asarray(torch.as_tensor(t, dtype=torch.float64).cpu()) * np.ones(n)


def told_times(schedule: Schedule, told: np.ndarray[Any, Any]) -> Tensor:
    """The times a network is told: int64 where a discrete schedule tells whole steps only, else float32."""
    whole = schedule.T is not None and bool((told % 1 == 0).all())
    return torch.as_tensor(told).to(torch.int64 if whole else torch.float32)


def per_image(number: np.ndarray[Any, Any], x: Tensor) -> Tensor:
    """(N,) numbers on the host to a tensor that broadcasts over x (N, C, *spatial), in its dtype and on its device."""
    return torch.as_tensor(number, dtype=x.dtype, device=x.device).reshape(-1, *(1,) * (x.ndim - 1))


def marginals(schedule: Schedule, t: np.ndarray[Any, Any]) -> Tensor:
    """[alpha, sigma] of each time, (N, 2) float32, computed in float64 on the host."""
    return torch.as_tensor(np.stack([schedule.alpha(t), schedule.sigma(t)], 1), dtype=torch.float32)


def q_sample(
    x0: Tensor,
    t: Tensor | Sequence[float] | float,
    schedule: Schedule,
    noise: Tensor | None = None,
    seed: int | None = None,
    index: Tensor | None = None,
) -> Tensor:
    """x_t = alpha_t x0 + sigma_t eps, (N, C, *spatial) in x0's dtype, fp32 for uint8 pixels. Ho 2020, eq. 4.

    t: one time or one an image, in the schedule's units (integer steps 0..T-1, or 0..1, or sigma). noise: eps, shaped
    like x0. seed: Philox noise of images `index` (0..N-1 unless given); with neither, eps comes from torch's generator,
    so that calls differ. Raises ValueError for a t outside the schedule.
    """
    times = host_times(t, len(x0))
    lowest = 0 if schedule.T is None else -1
    if bool(((times < lowest) | (times > schedule.t_max) | np.isnan(times)).any()):
        raise ValueError(
            f"q_sample: t={t} leaves the schedule {schedule.name}; accepted: {lowest} to {schedule.t_max:g}"
        )
    if noise is None and seed is None:
        noise = torch.randn(x0.shape, device=x0.device)
    line = torch.arange(len(x0), device=x0.device)
    key = None if seed is None else philox.seed_tensor(seed, x0.device)
    number = line if index is None else index.to(x0.device)
    x_t = noised(x0, line, marginals(schedule, times).to(x0.device), noise=noise, seed=key, index=number)
    assert isinstance(x_t, Tensor)
    return x_t
