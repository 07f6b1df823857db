"""Solvers: each a pure function from noise levels to the numbers of a table; no tensor, no network."""

from fastdiff.tables.solvers.ancestral import ddim, ddpm, euler_ancestral
from fastdiff.tables.solvers.karras import euler, heun
from fastdiff.tables.solvers.multistep import dpm_multistep, dpmpp_2m, dpmpp_3m_sde, plms
from fastdiff.tables.solvers.table import Solver, Table

SOLVERS: dict[str, Solver] = {
    f.__name__: f for f in (ddim, ddpm, euler, euler_ancestral, heun, dpmpp_2m, dpmpp_3m_sde, dpm_multistep, plms)
}
"""By name."""

__all__ = ["SOLVERS", "Solver", "Table"]
__all__ += ["ddim", "ddpm", "dpm_multistep", "dpmpp_2m", "dpmpp_3m_sde", "euler", "euler_ancestral", "heun", "plms"]
