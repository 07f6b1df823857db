"""What `fd.verify` found: numbers, whether they keep their bounds, and a table to print."""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor


class Error(NamedTuple):
    """How far a tensor is from what it should be."""

    what: str
    largest: float
    """max |a - b|"""
    relative: float
    """|a - b| / |b|, in the norm of all entries."""
    bound: float = math.inf
    """Of `relative`; inf where it is told only."""

    @property
    def ok(self) -> bool:
        """Whether the bound is kept; NaN keeps none."""
        return self.bound == math.inf or self.relative <= self.bound

    def __str__(self) -> str:
        held = "" if self.bound == math.inf else f" {'<=' if self.ok else '> '} {self.bound:.1e}"
        return f"{self.what} {self.largest:.1e} abs, {self.relative:.1e} rel{held}"


class Line(NamedTuple):
    """One step, or one output."""

    name: str
    errors: tuple[Error, ...]


class Report(NamedTuple):
    """`print` it for one line a step, or an output; `ok` where every bound is kept."""

    title: str
    lines: tuple[Line, ...]

    @property
    def ok(self) -> bool:
        """Whether there is something to look at, and all of it keeps its bound."""
        errors = [error for line in self.lines for error in line.errors]
        return bool(errors) and all(error.ok for error in errors)

    def __str__(self) -> str:
        wide = max((len(line.name) for line in self.lines), default=0)
        lines = [f"  {line.name:{wide}}  {'; '.join(map(str, line.errors))}" for line in self.lines]
        return "\n".join([self.title, *lines, "ok" if self.ok else "NOT ok"])


def error(what: str, a: Tensor, b: Tensor, bound: float = math.inf) -> Error:
    """Of `a`, which should be `b`; both are compared in float64 on the host."""
    wide, want = a.detach().cpu().double(), b.detach().cpu().double()
    if wide.shape != want.shape:
        return Error(what, math.nan, math.nan, bound)
    apart, norm = wide - want, float(want.norm())
    far = float(apart.norm())
    largest = float(apart.abs().max()) if apart.numel() else 0.0
    return Error(what, largest, far / norm if norm else far, bound)
