"""The rows that a scheduler's steps run on: the config's solver over the grid, from where the loop starts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from fastdiff import row
from fastdiff.formats.diffusers.config import Reading
from fastdiff.formats.diffusers.grid import Laid
from fastdiff.tables.curve import Array
from fastdiff.tables.grid import Levels, levels_of_u
from fastdiff.tables.plan import exploding, plan
from fastdiff.tables.solvers import SOLVERS
from fastdiff.tables.solvers.multistep import SHORT

EXPLODING = ("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler")
"""Classes whose state is x0 + u eps, and whose network input is scaled."""
MULTISTEP = "DPMSolverMultistepScheduler"
NARROWING = ("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", MULTISTEP)
"""Classes whose state comes back in the dtype of the network's output."""
VARIANCES = {
    **dict.fromkeys(("fixed_small", "fixed_small_log"), "beta_tilde"),
    **dict.fromkeys(("fixed_large", "fixed_large_log"), "beta"),
    **dict.fromkeys(("learned", "learned_range"), "learned_range"),
}


class Rule(NamedTuple):
    """Our solver of a class of diffusers'."""

    solver: str
    options: Callable[[Mapping[str, Any]], dict[str, Any]]
    """Its options from the config."""
    remembers: bool
    """Whether a row reads what earlier rows wrote, so that a loop must start at its first row."""


def _multistep(c: Mapping[str, Any]) -> dict[str, Any]:
    return {"order": c["solver_order"], "algorithm": c["algorithm_type"], "kind": c["solver_type"]}


RULES = {
    "DDPMScheduler": Rule("ddpm", lambda c: {"variance": VARIANCES[c["variance_type"]]}, False),
    "DDIMScheduler": Rule("ddim", lambda _: {}, False),
    "EulerDiscreteScheduler": Rule("euler", lambda _: {}, False),
    "EulerAncestralDiscreteScheduler": Rule("euler_ancestral", lambda _: {}, False),
    "HeunDiscreteScheduler": Rule("heun", lambda _: {}, True),
    MULTISTEP: Rule("dpm_multistep", _multistep, True),
    "PNDMScheduler": Rule("plms", lambda _: {"clipped_direction": False}, True),
}


def _of_grid(reading: Reading, laid: Laid, begin: int) -> dict[str, Any]:
    """Options that depend on how long the grid is, and on where the loop starts in it."""
    if reading.name == "PNDMScheduler":
        return {"twice": begin == 0 and not laid.starts.all()}
    if reading.name != MULTISTEP:
        return {}
    c, n = reading.keys, len(laid.step)
    few = c["lower_order_final"] and n < SHORT
    last = 1 if few or c["euler_at_final"] or c["final_sigmas_type"] == "zero" else 3
    return {"ends": (2 if few else 3, last)}


def rows_of(reading: Reading, laid: Laid, begin: int, options: Mapping[str, Any]) -> Array:
    """Rows (calls - begin + 1, columns) in float64 from call `begin` on; options: of the solver, over the config's."""
    rule = RULES[reading.name]
    first = int(laid.step[begin])
    given = {**rule.options(reading.keys), **_of_grid(reading, laid, begin), **options}
    # what the network says is thresholded before the rows see it, as an image
    predicts = "x0" if reading.keys.get("thresholding") else reading.predicts.removesuffix("+range")
    learned = "+range" if reading.predicts.endswith("+range") else ""
    rows = plan(
        reading.schedule,
        predicts + learned,
        SOLVERS[rule.solver],
        grid=_from(laid.levels, first),
        clip=reading.clip,
        **given,
    )
    if not rule.remembers:
        rows = _seen(rows)
    if not laid.starts[begin]:
        rows = np.vstack([_waiting(rows[0]), rows])
    assert len(rows) == len(laid.step) - begin + 1
    return exploding(rows) if reading.name in EXPLODING else rows


def _seen(rows: Array) -> Array:
    """Rows that leave x0 in the first slot: the slots are free, and the caller wants to see it."""
    rows[:-1, [row.P, row.SLOT]], rows[:-1, row.Q] = 0.0, 1.0
    return rows


def _from(levels: Levels, first: int) -> Levels:
    """The levels from number `first` on."""
    return levels._replace(**{name: getattr(levels, name)[first:] for name in ("t", "alpha", "sigma", "u")})


def _waiting(first: Array) -> Array:
    """A row that leaves the state alone: the stage of a step that was not taken."""
    out = first.copy()
    out[row.A : row.S + 1], out[[row.P, row.Q]] = 0.0, 0.0
    out[row.A], out[row.END] = 1.0, 0.0
    return out


def churned(reading: Reading, laid: Laid, k: int, gamma: float) -> Array:
    """One row from the level u (1 + gamma), where call k's state is once churn noise is added, to the next level."""
    u, v = float(laid.levels.u[laid.step[k]]), float(laid.levels.u[laid.step[k] + 1])
    grid = levels_of_u(reading.schedule, [u * (1 + gamma), v], [laid.levels.t[laid.step[k]], 0.0])
    rows = plan(reading.schedule, reading.predicts, SOLVERS[RULES[reading.name].solver], grid=grid)
    return exploding(_seen(rows))
