"""What a call leaves open: the caller's word first, then the Denoiser's defaults, then ours (ddim, 50 steps)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from fastdiff.sampling.denoiser import Denoiser
from fastdiff.tables.schedule import Schedule
from fastdiff.tables.solvers import SOLVERS, Table

Solver = Callable[..., Table] | str
Spacing = str | Callable[[Schedule, int], Any]

STEPS = 50
_GRID = ("final", "t_end", "denoise", "steps_offset")


class Choice(NamedTuple):
    """A solver over a grid: what `fd.plan` needs to know beside the schedule."""

    solver: Callable[..., Table]
    steps: int | None
    """None where times or the spacing's own name (ddim25; 10,15,20) count them."""
    spacing: Spacing | None
    options: dict[str, Any]

    @property
    def name(self) -> str:
        """The solver's name in SOLVERS, else its function's."""
        return next((n for n, f in SOLVERS.items() if f is self.solver), getattr(self.solver, "__name__", "custom"))


def _function(solver: Solver) -> Callable[..., Table]:
    if not isinstance(solver, str):
        return solver
    if solver not in SOLVERS:
        raise ValueError(f"solver={solver!r} is unknown; accepted: {', '.join(SOLVERS)}, or a function of yours")
    return SOLVERS[solver]


def _counts(spacing: Spacing | None) -> bool:
    """Whether the spacing's name says how many steps there are."""
    return isinstance(spacing, str) and any(c.isdigit() for c in spacing)


def choose(
    den: Denoiser,
    solver: Solver | None = None,
    steps: int | None = None,
    spacing: Spacing | None = None,
    times: Sequence[float] | None = None,
) -> Choice:
    """Fill in what the caller left None. Raises ValueError for an unknown solver.

    The Denoiser's own options of a solver hold for its own solver only, and its grid ends where it says unless the
    caller gives times. ddpm without a word about steps takes all T of a discrete schedule.
    """
    given = dict(den.defaults)
    own, named = _function(given.pop("solver", None) or "ddim"), given.pop("options", {})
    chosen = own if solver is None else _function(solver)
    own_steps, own_spacing = given.pop("steps", None), given.pop("spacing", None)
    options = {**given, **(named if chosen is own else {})}
    if times is not None or spacing is not None:
        options = {k: v for k, v in options.items() if k not in (_GRID if times is not None else ("steps_offset",))}
    if times is not None:
        return Choice(chosen, steps, spacing, options)
    if spacing is None and not (steps is not None and _counts(own_spacing)):
        spacing = own_spacing
    if steps is None and not _counts(spacing):
        steps = own_steps or (den.schedule.T if chosen is SOLVERS["ddpm"] and den.schedule.T else STEPS)
    return Choice(chosen, steps, spacing, options)
