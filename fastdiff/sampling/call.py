"""One call of a sampler, understood: the numbers of its rows, its conditions on the device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastdiff import row
from fastdiff.sampling.defaults import Choice
from fastdiff.sampling.denoiser import Denoiser
from fastdiff.sampling.guidance import Cond, Guidance, Guided, Potential, map_cond
from fastdiff.sampling.reuse import DeepCache
from fastdiff.tables.plan import plan


class Call(NamedTuple):
    """What one call of a sampler brings, beside solver and weight, which are numbers in the rows."""

    rows: np.ndarray[Any, Any]  # (K + 1, columns), float64, on the host
    images: int
    seed: int
    numbers: Tensor | Sequence[int] | None  # `index` of fd.sample
    x: Tensor | None
    watched: bool
    reuse: DeepCache | None
    halves: int  # 2 under guidance
    cond: Cond  # images times halves, on the device
    energies: tuple[Potential, ...]
    told: tuple[Cond, ...]  # by energy
    pulls: np.ndarray[Any, Any]  # (K, energies), their weights


def numbers(
    den: Denoiser,
    choice: Choice,
    times: Sequence[float] | None,
    clip: float | None,
    guidance: Guidance | None,
    options: dict[str, Any],
) -> np.ndarray[Any, Any]:
    """The numbers of a call, float64 on the host; the caller's options go before the Denoiser's."""
    if "w" in options:
        raise ValueError("the guidance weight is no option of a solver; pass guidance=fd.cfg(w)")
    given = {"clip": None, **choice.options, **options}
    own_clip = given.pop("clip")
    return plan(
        den.schedule,
        den.predicts,
        choice.solver,
        steps=choice.steps,
        spacing=choice.spacing,
        times=times,
        clip=own_clip if clip is None else clip,
        w=1.0 if guidance is None else guidance.weight,
        sigma_data=den.sigma_data,
        **given,
    )


def _images(cond: Cond, n: int, device: torch.device) -> Cond:
    """cond on the device; a label or a list of labels becomes a tensor, a single one stands for all n images."""
    numbers = isinstance(cond, list) and all(isinstance(c, int) for c in cond)
    if numbers or isinstance(cond, int | np.integer | np.ndarray | range):
        cond = torch.as_tensor(cond)

    def fit(c: Tensor) -> Tensor:
        c = c.to(device)
        c = c.expand(n, *c.shape[1:]) if c.ndim == 0 or (len(c) == 1 != n) else c
        if len(c) != n:
            raise ValueError(f"cond holds {len(c)} images, the shape asks for {n}; pass one condition an image")
        return c

    return map_cond(fit, cond)


def conditions(
    den: Denoiser, rows: np.ndarray[Any, Any], images: int, cond: Cond, guided: Guided
) -> tuple[int, Cond, tuple[Potential, ...], tuple[Cond, ...], np.ndarray[Any, Any]]:
    """The last five parts of a Call. Raises ValueError where guidance has no condition to work with."""
    device = den.device
    cond = _images(cond, images, device)
    halves = 2 if guided.cfg is not None and bool((rows[:-1, row.W] != 1).any()) else 1
    if guided.cfg is not None and halves == 2:
        if cond is None:
            raise ValueError("guidance needs a condition; pass cond= (class labels, say), or guidance=None")
        null = _images(den.null(cond, guided.cfg.null), images, device)
        cond = map_cond(lambda c, u: torch.cat([c, u.to(c)]), cond, null)
    told = tuple(_images(e.told, images, device) for e in guided.energies)
    return halves, cond, tuple(e.potential for e in guided.energies), told, guided.pulls(rows)
