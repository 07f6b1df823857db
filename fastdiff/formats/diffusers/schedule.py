"""How `fd.load` samples from a checkpoint of diffusers': its scheduler's config as a schedule and defaults."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastdiff.formats.diffusers.config import read
from fastdiff.formats.diffusers.refusal import one_of, refuse
from fastdiff.formats.diffusers.rows import RULES
from fastdiff.tables.schedule import Schedule

__all__ = ["one_of", "refuse", "schedule_of"]


def schedule_of(scheduler_config: Mapping[str, Any]) -> tuple[Schedule, str, dict[str, Any]]:
    """(schedule, predicts, defaults for `fd.sample`) of a diffusers scheduler's config.

    predicts: "eps", "x0" or "v", with "+range" where the network also gives a learned variance.
    defaults: "solver" (a name of `fd.SOLVERS`), "steps" None, "spacing" ("leading", "trailing" or "linspace"), "final"
    ("zero", or "first" where diffusers ends at the first step's own level), "clip" (bound on x0 or None), "options" (of
    the solver), and "steps_offset" where "leading" has one. {} and a config without _class_name are DDPMScheduler's.

    Where diffusers does not step over one grid, ours is the nearest: DDIM and PNDM jump T // steps back from each time,
    whatever the spacing (the same for "leading" and where steps divides T); Euler and Heun have fractional times for
    "linspace"; DPMSolverMultistep counts one more step for "leading" and "linspace" and leaves out the last; "karras"
    and "exponential" start from the schedule's last level whatever the spacing. PNDM's Runge-Kutta steps at the start
    (skip_prk_steps=False) are one Heun step here. `fd.DiffusersScheduler` follows the grids to the letter.
    Keys of the other classes are ignored as diffusers does. Raises ValueError naming the key that is not supported.
    """
    reading = read(scheduler_config)
    c, rule = reading.keys, RULES[reading.name]
    options = rule.options(c)
    if reading.name == "DDIMScheduler":
        options["clipped_direction"] = False
    if c.get("variance_type") == "learned":
        raise refuse("variance_type", "learned", "'learned_range'; fd.DiffusersScheduler takes it")
    for key, only in _SCHEDULER_ONLY.items():
        if c.get(key) not in (only, None):
            raise refuse(key, c[key], f"{only!r}; fd.DiffusersScheduler takes it")
    solver, options = _plainest(rule.solver, options)
    if solver == "dpm_multistep" and not c["lower_order_final"]:
        options["ends"] = []
    spacing = next((name for key, name in _RAMPS.items() if c.get(key)), c["timestep_spacing"])
    first = not c.get("set_alpha_to_one", True) or c.get("final_sigmas_type") == "sigma_min"
    defaults = {
        "solver": solver,
        "steps": None,
        "spacing": spacing,
        "final": "first" if first else "zero",
        "clip": reading.clip,
        "options": options,
    }
    if spacing == "leading" and c["steps_offset"]:
        defaults["steps_offset"] = c["steps_offset"]
    return reading.schedule, reading.predicts, defaults


# keys that need more than a table over a spacing with a name
_SCHEDULER_ONLY: dict[str, Any] = {
    "thresholding": False,
    "use_beta_sigmas": False,
    "timestep_type": "discrete",
    "sigma_min": None,
    "sigma_max": None,
    "lambda_min_clipped": -float("inf"),
    "euler_at_final": False,
}
_RAMPS = {
    "use_karras_sigmas": "karras",
    "use_exponential_sigmas": "exponential",
    "use_lu_lambdas": "exponential",
}


def _plainest(solver: str, options: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The name that the method is known by, where it has one of its own."""
    if options == {"order": 2, "algorithm": "dpmsolver++", "kind": "midpoint"}:
        return "dpmpp_2m", {}
    return solver, options
