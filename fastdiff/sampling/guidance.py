"""Guidance: what stands between the network's two halves, conditional and unconditional."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

Cond = Any
"""A tensor, or a tuple, list or dict of tensors; the image axis first everywhere."""


def map_cond(f: Callable[..., Tensor], cond: Cond, *others: Cond) -> Cond:
    """f of every tensor in cond, together with the tensors in the same places of the others; None stays None.

    Raises TypeError for what is no tensor, tuple, list or dict, ValueError where the others are not built like cond.
    """
    if cond is None:
        return None
    if isinstance(cond, Tensor):
        if not all(isinstance(other, Tensor) for other in others):
            raise ValueError(_UNLIKE)
        return f(cond, *others)
    if isinstance(cond, dict):
        if not all(isinstance(other, dict) and other.keys() == cond.keys() for other in others):
            raise ValueError(_UNLIKE)
        return {name: map_cond(f, part, *(other[name] for other in others)) for name, part in cond.items()}
    if not isinstance(cond, tuple | list):
        raise TypeError(f"cond holds a {type(cond).__name__}; accepted: tensors, and tuples, lists and dicts of them")
    if not all(isinstance(other, tuple | list) and len(other) == len(cond) for other in others):
        raise ValueError(_UNLIKE)
    parts = [map_cond(f, *each) for each in zip(cond, *others, strict=True)]
    return type(cond)(*parts) if hasattr(cond, "_fields") else type(cond)(parts)


_UNLIKE = (
    "guidance: the null condition is not built like the condition; pass fd.cfg(w, null=...) with the same tensors in "
    "the same places"
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
    if not math.isfinite(w):
        raise ValueError(f"cfg: w={w} is no weight; pass a finite number, 1 for none")
    if between is not None and not 0 <= between[0] <= between[1]:
        raise ValueError(f"cfg: between={between} is no interval of u; pass (low, high) with 0 <= low <= high")
    return Guidance(float(w), between, null)
