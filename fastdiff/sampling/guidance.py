"""Guidance: between the network's two halves, conditional and unconditional, and by energies that pull at x."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor, nn
from torch.nn import functional

from fastdiff import row

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
        return self.w if _inside(self.between, u) else 1.0


def cfg(w: float, between: tuple[float, float] | None = None, null: Cond = None) -> Guidance:
    """Classifier-free guidance F = F_u + w (F_c - F_u): w = 1 is none, w = 0 unconditional, w > 1 sharper.

    between: (low, high) in u = sigma/alpha outside of which w = 1 and the network runs one half only.
    null: the condition that stands for "none", a tensor or a function of cond; by default the network's `null(cond)`.
    Ho & Salimans 2022; Kynkaanniemi 2024 (the interval).
    """
    if not math.isfinite(w):
        raise ValueError(f"cfg: w={w} is no weight; pass a finite number, 1 for none")
    return Guidance(float(w), _interval("cfg", between), null)


def _inside(between: tuple[float, float] | None, u: float) -> bool:
    return between is None or between[0] <= u <= between[1]


def _interval(who: str, between: tuple[float, float] | None) -> tuple[float, float] | None:
    if between is not None and not 0 <= between[0] <= between[1]:
        raise ValueError(f"{who}: between={between} is no interval of u; pass (low, high) with 0 <= low <= high")
    return between


class Potential(NamedTuple):
    """A function E(x, t, cond) -> (N,), and what it looks at: "x_t" or "x0"."""

    f: Callable[[Tensor, Tensor, Cond], Tensor]
    of: str


class Energy(NamedTuple):
    """A potential with its weight, the interval of u in which it acts, and what it is told in place of cond."""

    potential: Potential
    weight: float
    between: tuple[float, float] | None
    told: Cond

    def pull(self, u: float) -> float:
        """The weight at noise level u: 0 outside the interval."""
        return self.weight if _inside(self.between, u) else 0.0


def energy(
    f: Callable[[Tensor, Tensor, Cond], Tensor],
    weight: float = 1.0,
    *,
    of: str = "x0",
    told: Cond = None,
    between: tuple[float, float] | None = None,
) -> Energy:
    """Guidance by an energy: samples from p(x_t) exp(-weight E), score' = score - weight grad_x E.

    f(x, t, cond) -> (N,), E of each image, differentiable, without numbers read on the host. of: "x0", the network's
    estimate of the clean image (the gradient goes through the network), or "x_t", the noisy image itself. told: what f
    gets in place of cond, tensors with the image axis first (measurements, labels). between: (low, high) in u =
    sigma/alpha outside of which it does not act. Dhariwal & Nichol 2021 (a classifier's); Chung 2023 (of x0).
    """
    if not callable(f):
        raise TypeError(f"energy: f={f!r} is no function; pass f(x, t, cond) -> (N,)")
    try:
        hash(f)
    except TypeError:
        raise TypeError(f"energy: f={f!r} is not hashable, and could not be found again; pass a function") from None
    if of not in ("x0", "x_t"):
        raise ValueError(f'energy: of={of!r} is unknown; accepted: "x0", "x_t"')
    if not math.isfinite(weight):
        raise ValueError(f"energy: weight={weight} is no weight; pass a finite number")
    return Energy(Potential(f, of), float(weight), _interval("energy", between), told)


def classifier(
    net: Callable[[Tensor, Tensor], Tensor],
    weight: float = 1.0,
    *,
    labels: Any = None,
    between: tuple[float, float] | None = None,
) -> Energy:
    """Classifier guidance: the energy -log p(label | x_t), score' = score + weight grad_x log p(label | x_t).

    net(x_t, t) -> logits (N, classes), trained on noisy images. labels (N,) int64; None is cond. Dhariwal & Nichol
    2021, algorithm 2.
    """
    return energy(_Surprise(net), weight, of="x_t", told=labels, between=between)


@dataclass(frozen=True)
class _Surprise:
    """-log p(label | x_t); equal for the same network, so that a captured step is found again."""

    net: Callable[[Tensor, Tensor], Tensor]

    def __call__(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        return functional.cross_entropy(self.net(x, t).to(x.dtype), label, reduction="none")


def networks(net: Any, potentials: tuple[Potential, ...]) -> list[nn.Module]:
    """The modules that a step calls, as far as they can be seen: not what a function closes over."""
    called = [net, *(part for e in potentials for part in (e.f, getattr(e.f, "net", None)))]
    return [m for m in called if isinstance(m, nn.Module)]


class Guided(NamedTuple):
    """All the guidance of a call."""

    cfg: Guidance | None
    energies: tuple[Energy, ...]

    def pulls(self, rows: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """(K, energies), the weight of each in each of K + 1 rows but the last. Raises ValueError at alpha = 0."""
        alpha, sigma = rows[:-1, row.ALPHA], rows[:-1, row.SIGMA]
        u = np.divide(sigma, alpha, out=np.full_like(sigma, np.inf), where=alpha != 0)
        pulls = np.array([[e.pull(float(v)) for e in self.energies] for v in u]).reshape(len(u), len(self.energies))
        if (pulls[alpha == 0] != 0).any():
            raise ValueError(
                "energy: the first level is pure noise (alpha = 0), where an energy of an image says nothing; pass "
                "between=(0, u) with a finite u = sigma/alpha"
            )
        return pulls


def gathered(guidance: Any) -> Guided:
    """One guidance or several. Raises TypeError for what is none, ValueError for two of the first kind."""
    parts = () if guidance is None else (guidance,) if isinstance(guidance, Guidance | Energy) else guidance
    if not isinstance(parts, tuple | list) or any(not isinstance(g, Guidance | Energy) for g in parts):
        raise TypeError(
            f"guidance={guidance!r} is a {type(guidance).__name__}; pass fd.cfg(w), fd.energy(f), fd.classifier(net) "
            "or a list of them"
        )
    weights = [g for g in parts if isinstance(g, Guidance)]
    if len(weights) > 1:
        raise ValueError("guidance: two fd.cfg in one list; pass one, with the weight that you want")
    return Guided(weights[0] if weights else None, tuple(g for g in parts if isinstance(g, Energy)))
