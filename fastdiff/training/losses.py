"""What training minimises: the distance between the network's output and what it should have been.

    x_t = alpha_t x0 + sigma_t eps,    L = mean |F(x_t, t) - F*|^2

    F* = eps | x0 | v = alpha eps - sigma x0 | flow: eps - x0 | edm: (x0 - c_skip x_t) / c_out
    score: |sigma F + eps|^2, denoising score matching with lambda = sigma^2

Ho 2020, eq. 14 (simple); Salimans & Ho 2022 (v); Karras 2022, table 1 (edm, whose weight cancels c_out^2);
Vincent 2011 and Song & Ermon 2019 (score).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastdiff.ops import philox, q_sample as noised
from fastdiff.sampling.denoiser import Denoiser
from fastdiff.sampling.forward import marginals, per_image, told_times
from fastdiff.sampling.guidance import Cond
from fastdiff.tables.predict import predict
from fastdiff.tables.schedule import Schedule

KINDS = ("simple",)


def draw_times(schedule: Schedule, seed: Tensor, index: Tensor) -> np.ndarray[Any, Any]:
    """A time for each image from Philox stream 4, float64 on the host.

    Discrete: uniform on 0..T-1 (Ho 2020, algorithm 1). Continuous: uniform on t_end..t_max; ve: log-uniform in sigma
    (Song & Ermon 2019); edm: ln sigma ~ N(-1.2, 1.2^2) within the schedule's range (Karras 2022, table 1).
    """
    u = philox.uniform(seed, index, 0, philox.TIME, (1,))[:, 0].numpy().astype(np.float64)
    if schedule.T is not None:
        return np.minimum(np.floor(u * schedule.T), schedule.T - 1)
    low, high = schedule.t_end, schedule.t_max
    if schedule.name == "edm":
        z = philox.normal(seed, index, 0, philox.TIME, (1,))[:, 0].numpy().astype(np.float64)
        return np.clip(np.exp(1.2 * z - 1.2), low, high)
    if schedule.name == "ve":
        return np.asarray(low * (high / low) ** u)
    return np.asarray(low + (high - low) * u)


class _Columns(NamedTuple):
    """How F is compared: the network sees c_in x_t, the loss is mean |weight F - F*|^2."""

    c_in: Tensor | float
    weight: Tensor | float
    wanted: Tensor


def _columns(den: Denoiser, x0: Tensor, x_t: Tensor, eps: Tensor, t: np.ndarray[Any, Any]) -> _Columns:
    host = den.schedule.alpha(t), den.schedule.sigma(t)
    alpha, sigma = (per_image(v, x_t) for v in host)
    match den.predicts:
        case "eps":
            return _Columns(1.0, 1.0, eps)
        case "x0":
            return _Columns(1.0, 1.0, x0)
        case "v":
            return _Columns(1.0, 1.0, alpha * eps - sigma * x0)
        case "flow":
            return _Columns(1.0, 1.0, eps - x0)
        case "score":
            return _Columns(1.0, sigma, -eps)
        case "edm":
            numbers = predict("edm", *host, sigma_data=den.sigma_data)
            c_in, c_skip, c_out = (per_image(v, x_t) for v in numbers)
            return _Columns(c_in, 1.0, (x0 - c_skip * x_t) / c_out)
    raise ValueError(
        f"loss: a network that predicts {den.predicts!r} has no simple loss; accepted: eps, x0, v, flow, score, edm"
    )


def loss(
    den: Denoiser,
    x: Tensor,
    cond: Cond = None,
    kind: str = "simple",
    *,
    seed: int | None = None,
    index: Tensor | None = None,
) -> Tensor:
    """The loss of a batch, a scalar with gradients; formulas at the head of this file.

    x (N, C, *spatial): images in [-1, 1], or uint8 pixels, which stay uint8 until they are noised. seed, index: key and
    images' numbers of the Philox noise and times (0..N-1 unless given): the same two give the same loss. Without a seed
    one is drawn from torch's generator, so that calls differ. Raises ValueError where the network's output is of
    another shape.
    """
    if kind not in KINDS:
        raise ValueError(f"loss: kind={kind!r} is unknown; accepted: {', '.join(KINDS)}")
    if seed is None:
        seed = int(torch.randint(2**63 - 1, ()))
    host_seed, number = philox.seed_tensor(seed), torch.arange(len(x)) if index is None else index.cpu()
    t = draw_times(den.schedule, host_seed, number)
    line = torch.arange(len(x), device=x.device)
    x_t, eps = noised(
        x,
        line,
        marginals(den.schedule, t).to(x.device),
        seed=host_seed.to(x.device),
        index=number.to(x.device),
        eps=True,
    )
    x0 = x if x.is_floating_point() else x.to(x_t.dtype) / 127.5 - 1
    c_in, weight, wanted = _columns(den, x0, x_t, eps, t)
    told = told_times(den.schedule, den.schedule.told(t)).to(x.device)
    F = den.net((c_in * x_t).to(den.dtype or x_t.dtype), told, cond)
    if F.shape != wanted.shape:
        raise ValueError(
            f"loss: the network returned {tuple(F.shape)} where {den.predicts!r} of images {tuple(x.shape)} is wanted; "
            "check its output channels (a learned variance has a loss of its own)"
        )
    return (weight * F - wanted).square().mean()
