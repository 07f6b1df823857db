"""Guidance: what stands between the network's two halves, conditional and unconditional."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

Cond = Any
"""A tensor, or a tuple, list or dict of tensors; the image axis first everywhere."""


def map_cond(f: Callable[[Tensor], Tensor], cond: Cond) -> Cond:
    """f of every tensor in cond; None stays None."""
    if cond is None or isinstance(cond, Tensor):
        return None if cond is None else f(cond)
    if isinstance(cond, dict):
        return {name: map_cond(f, part) for name, part in cond.items()}
    return type(cond)(map_cond(f, part) for part in cond)


def cat_cond(cond: Cond, null: Cond) -> Cond:
    """[cond, null] along the image axis, part by part. Raises ValueError where the two are not built alike."""
    if isinstance(cond, Tensor) and isinstance(null, Tensor):
        return torch.cat([cond, null.to(cond)])
    if isinstance(cond, dict) and isinstance(null, dict) and cond.keys() == null.keys():
        return {name: cat_cond(cond[name], null[name]) for name in cond}
    if type(cond) is type(null) and not isinstance(cond, dict) and len(cond) == len(null):
        return type(cond)(cat_cond(c, u) for c, u in zip(cond, null, strict=True))
    raise ValueError(
        f"guidance: the null condition is a {type(null).__name__} unlike the condition, a {type(cond).__name__}; "
        "pass fd.cfg(w, null=...) with the same tensors in the same places"
    )


class Guidance(NamedTuple):
    """Classifier-free guidance: weight, interval of u = sigma/alpha in which it acts, the null condition."""

    w: float
    between: tuple[float, float] | None
    null: Cond

    def weight(self, u: float) -> float:
        """The weight at noise level u: w inside the interval, else 1."""
        inside = self.between is None or self.between[0] <= u <= self.between[1]
        return self.w if inside else 1.0


def cfg(w: float, between: tuple[float, float] | None = None, null: Cond = None) -> Guidance:
    """Classifier-free guidance F = F_u + w (F_c - F_u): w = 1 is none, w = 0 unconditional, w > 1 sharper.

    between: (low, high) in u = sigma/alpha outside of which w = 1 and the network runs one half only.
    null: the condition that stands for "none", a tensor or a function of cond; by default the network's `null(cond)`.
    Ho & Salimans 2022; Kynkaanniemi 2024 (the interval).
    """
    if between is not None and not 0 <= between[0] <= between[1]:
        raise ValueError(f"cfg: between={between} is no interval of u; pass (low, high) with 0 <= low <= high")
    return Guidance(float(w), between, null)
