"""Configurations of every solver, and ways to break one, for the tests of plan and promise."""

from __future__ import annotations

import numpy as np

from fastdiff import row
from fastdiff.tables.plan import plan
from fastdiff.tables.solvers import (
    ddim,
    ddpm,
    dpm_multistep,
    dpmpp_2m,
    dpmpp_3m_sde,
    euler,
    euler_ancestral,
    heun,
    plms,
)

CONFIGS = [
    *((ddim, {}), (ddim, {"eta": 0.7}), (ddim, {"eta": 1.0}), (ddim, {"clipped_direction": False})),
    *((ddim, {"clipped_direction": False, "eta": 0.3}), (ddpm, {}), (ddpm, {"variance": "beta"})),
    *((ddpm, {"variance": "learned_range"}), (euler, {}), (euler, {"churn": 40.0})),
    *((euler, {"churn": 40.0, "s_noise": 1.007}), (heun, {}), (heun, {"churn": 40.0, "s_min": 0.05, "s_max": 50.0})),
    *((heun, {"churn": 40.0, "s_noise": 1.003}), (dpmpp_2m, {})),
    *((dpmpp_3m_sde, {}), (dpmpp_3m_sde, {"eta": 0.5}), (dpmpp_3m_sde, {"eta": 0.0, "corrected": True})),
    *((dpm_multistep, {"kind": "heun"}), (dpm_multistep, {"order": 3, "ends": (2, 1)}), (euler_ancestral, {})),
    *((dpm_multistep, {"algorithm": "dpmsolver", "order": order}) for order in (1, 2, 3)),
    *((dpm_multistep, {"algorithm": "sde-dpmsolver", "order": 2, "kind": kind}) for kind in ("midpoint", "heun")),
    *((dpm_multistep, {"algorithm": "sde-dpmsolver++", "order": order}) for order in (2, 3)),
    *((plms, {}), (plms, {"order": 2, "twice": False}), (plms, {"clipped_direction": False})),
]


def planned(s, t, config):
    solver, options = config
    rows = plan(s, "v+range" if options.get("variance") == "learned_range" else "v", solver, times=t, **options)
    assert np.isfinite(np.delete(rows, row.CLIP, axis=1)).all()
    return rows


def mutated(solver, change):
    """`solver` with its table changed: change(coef, hist, u, v) edits in place."""

    def broken(grid):
        table = solver(grid)
        coef, hist = table.coef.copy(), table.hist.copy()
        change(coef, hist, table.u, np.append(table.u[1:], grid.u[-1]))
        return table._replace(coef=coef, hist=hist)

    return broken


def edits(**columns):
    """A change that multiplies columns a, b0, be, b1, b2, b3, s."""

    def change(coef, hist, u, v):
        for name, factor in columns.items():
            coef[:, ["a", "b0", "be", "b1", "b2", "b3", "s"].index(name)] *= factor

    return change
