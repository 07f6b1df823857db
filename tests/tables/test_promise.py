"""Every table keeps its promise, and planted bugs are caught by it or by the order of convergence."""

from __future__ import annotations

import itertools
from functools import partial

import numpy as np
import pytest

from fastdiff import row
from fastdiff.tables.plan import plan
from fastdiff.tables.promise import check
from fastdiff.tables.schedule import (
    cosine,
    edm,
    flow,
    linear,
    scaled_linear,
    sigmoid,
    sub_vp,
    times,
    ve,
    vp,
)
from fastdiff.tables.solvers import Table, ddim, ddpm, dpmpp_2m, dpmpp_3m_sde, euler, heun
from tests.tables.configs import CONFIGS, edits, mutated, planned
from tests.tables.gaussian import denoiser, order, run

SCHEDULES = [
    *(linear(), scaled_linear(), cosine(), sigmoid(), linear(T=4000, beta_start=2.5e-5, beta_end=0.005)),
    *(vp(), scaled_linear(T=None), sub_vp(), ve(), edm(), flow(), cosine(T=None), sigmoid(T=None)),
]
DISCRETE_SPACINGS = ["trailing", "leading", "linspace", "quad", "karras", "exponential", "logsnr"]


def grids(s, steps):
    """Every spacing that the schedule has, both ends; a schedule that starts at u = inf has uniform times only."""
    finite = s.T is not None or s.alpha(np.array(s.t_max)) > 0
    continuous = ["uniform", "karras", "exponential", "logsnr"] if finite else ["uniform"]
    for spacing in DISCRETE_SPACINGS if s.T else continuous:
        for final in ("zero", "first"):
            yield times(s, steps, spacing, final=final)


@pytest.mark.parametrize("s", SCHEDULES, ids=lambda s: f"{s.name}-{s.T}")
def test_every_table_keeps_its_promise(s):
    # `plan` raises on a broken promise, so a false alarm fails here; configurations take turns over the grids
    turn = itertools.cycle(CONFIGS)
    for steps in (1, 2, 3, 5, 10, 50):
        for t in grids(s, steps):
            for config in itertools.islice(turn, 4):
                planned(s, t, config)
    for t in grids(s, 1000):
        planned(s, t, next(turn))


@pytest.mark.slow
@pytest.mark.parametrize("s", SCHEDULES, ids=lambda s: f"{s.name}-{s.T}")
def test_every_table_keeps_its_promise_in_full(s):
    for steps in (1, 2, 3, 5, 10, 50, 1000):
        for t, config in itertools.product(grids(s, steps), CONFIGS):
            planned(s, t, config)


@pytest.mark.parametrize("s", [linear(), vp(), edm(), ve(), sub_vp()], ids=lambda s: s.name)
def test_inversion_keeps_the_promise_for_every_prediction(s):
    for steps, predicts in itertools.product((1, 2, 10, 100), ("eps", "x0", "v", "flow", "edm", "score")):
        for solver in (ddim, euler, heun, dpmpp_2m, partial(dpmpp_3m_sde, eta=0.0)):
            rows = plan(s, predicts, solver, times=times(s, steps, final="first")[::-1])
            assert rows[-1, row.SIGMA] > rows[0, row.SIGMA]


# ---- the two guards, and bugs planted for them


def heavier_history(coef, hist, u, v):
    coef[:, 1] -= 0.2 * coef[:, 3]
    coef[:, 3] *= 1.2


def no_history(coef, hist, u, v):
    coef[:, 1] += coef[:, 3]
    coef[:, 3] = 0


def steps_as_equal(coef, hist, u, v):
    # h/h_before upside down would pass: its errors (h^2 - h_before^2)/2 telescope; test_solvers has the paper's loop
    c = 1 - v / u
    w = np.where(coef[:, 3] != 0, 0.5, 0)
    coef[:, 1], coef[:, 3] = c * (1 + w), -c * w


def heavier_second_history(coef, hist, u, v):
    coef[:, 3] -= 0.2 * coef[:, 4]
    coef[:, 4] *= 1.2


def histories_swapped(coef, hist, u, v):
    both = coef[:, 4] != 0
    coef[both, 3], coef[both, 4] = coef[both, 4], coef[both, 3]


def sigma_of_now(coef, hist, u, v):
    coef[:, 0] = 1


def direction_flipped(coef, hist, u, v):
    coef[:, 0] *= -1
    coef[:, 1] = 1 - coef[:, 0]


def stage_weights(coef, hist, u, v):
    """Heun with 1/4 and 3/4 of the two slopes."""
    first = coef[:, 3] == 0
    hist[first] *= 0.5
    hist[first, 0] += 0.5
    coef[~first, :2] *= 1.5


def stage_weights_forgotten(coef, hist, u, v):
    """Heun that adds the whole second slope to half of the first."""
    coef[coef[:, 3] != 0, :2] *= 2


def euler_in_log_u(coef, hist, u, v):
    coef[:, 0] = 1 + np.log(np.maximum(v, 1e-9) / u)
    coef[:, 1] = -np.log(np.maximum(v, 1e-9) / u)


def gamma_twice(grid):
    table = heun(grid, churn=40.0)
    u = np.where(np.isin(table.u, grid.u), table.u, table.u**2 / grid.u[np.searchsorted(-grid.u, -table.u)])
    return table._replace(u=u)


def kick_in_its_own_step(grid):
    table = euler(grid, churn=40.0)
    coef = table.coef.copy()
    coef[1:, 6] = coef[:-1, 6]
    return table._replace(coef=coef)


def late_noise(grid):
    table = ddpm(grid, variance="beta")
    return table._replace(coef=ddpm(grid).coef)


def learned_range_of_tilde(grid):
    table = ddpm(grid, variance="learned_range")
    V = table.variance.copy()
    V[:, 1] = V[:, 0]
    return table._replace(variance=V)


def with_options(solver, **options):
    return lambda grid: solver(grid, **options)


CAUGHT_BY_PROMISE = {
    "2m: b0 1 % off": mutated(dpmpp_2m, edits(b0=1.01)),
    "2m: sigma of now instead of next": mutated(dpmpp_2m, sigma_of_now),
    "2m: history halved, sum lost": mutated(dpmpp_2m, edits(b1=0.5)),
    "3m: second history 1 % off": mutated(dpmpp_3m_sde, edits(b2=1.01)),
    "3m: noise 1 % off": mutated(dpmpp_3m_sde, edits(s=1.01)),
    "3m: noise of eta = 1 for eta = 0.5": lambda grid: dpmpp_3m_sde(grid, 0.5)._replace(
        coef=np.column_stack([dpmpp_3m_sde(grid, 0.5).coef[:, :6], dpmpp_3m_sde(grid, 1.0).coef[:, 6]])
    ),
    "ddim: noise 1 % off": mutated(with_options(ddim, eta=0.7), edits(s=1.01)),
    "ddim: unclipped direction 1e-9 off": mutated(with_options(ddim, clipped_direction=False), edits(be=1 + 1e-9)),
    "euler: step in log u": mutated(euler, euler_in_log_u),
    "heun: second slope whole": mutated(heun, stage_weights_forgotten),
    "heun: gamma applied twice": gamma_twice,
    "heun: churn noise 1 % off": mutated(with_options(heun, churn=40.0), edits(s=1.01)),
    "heun: s_noise 1 % off": mutated(with_options(heun, churn=40.0, s_noise=1.1), edits(s=1.01)),
    "euler: churn noise one step late": kick_in_its_own_step,
    "ddpm: beta_tilde where beta is declared": late_noise,
    "ddpm: a of Ho 1 % off": mutated(with_options(ddpm, variance="beta"), edits(a=1.01)),
    "ddpm: range of beta_tilde only": learned_range_of_tilde,
}
corrected_3m = partial(dpmpp_3m_sde, eta=0.0, corrected=True)
CAUGHT_BY_ORDER = {
    "2m: history weight wrong, sum kept": (mutated(dpmpp_2m, heavier_history), 2),
    "2m: history dropped, sum kept": (mutated(dpmpp_2m, no_history), 2),
    "2m: steps taken as equal": (mutated(dpmpp_2m, steps_as_equal), 2),
    "3m: second history's weight wrong, sum kept": (mutated(corrected_3m, heavier_second_history), 3),
    "3m: histories swapped": (mutated(corrected_3m, histories_swapped), 3),
    "3m: history weight wrong, sum kept": (mutated(corrected_3m, heavier_history), 3),
    "3m: half of the parabola": (partial(dpmpp_3m_sde, eta=0.0), 3),
    "heun: stage weights 1/4 and 3/4": (mutated(heun, stage_weights), 2),
    "ddim: direction flipped": (mutated(ddim, direction_flipped), 1),
}


@pytest.mark.parametrize("name", CAUGHT_BY_PROMISE)
def test_promise_catches(name):
    for s in (edm(), linear()):
        with pytest.raises(ValueError, match=r"breaks its promise at row \d+: .* should be .*, found "):
            plan(s, "v+range", CAUGHT_BY_PROMISE[name], steps=20)


@pytest.mark.parametrize("name", CAUGHT_BY_ORDER)
def test_order_catches_what_keeps_the_promise(name):
    solver, want = CAUGHT_BY_ORDER[name]
    plan(edm(), "v", solver, steps=20)
    assert abs(order(edm(), solver, before=2, finest=1024) - want) > 0.3


def change_rows(rows, name):
    rows = rows.copy()
    if name == "be not rescaled":
        rows[:-1, row.BF] /= rows[1:, row.ALPHA]
    elif name == "eps read through x0's column":
        rows[:-1, row.BF] *= rows[:-1, row.C_OUT]
    elif name == "slots off by one":
        rows[:, row.B1 : row.B3 + 1] = np.roll(rows[:, row.B1 : row.B3 + 1], 1, axis=1)
    elif name == "history of this row's alpha":
        rows[:-1, row.P] *= rows[:-1, row.ALPHA]
    elif name == "alphas in ratio, not sigmas":
        rows[:-1, row.A] *= rows[:-1, row.SIGMA] / rows[:-1, row.ALPHA]
    elif name == "memory not written":
        rows[:-1, [row.P, row.Q]] = 0
    return rows


@pytest.mark.parametrize(
    ("solver", "name"),
    [
        (with_options(ddim, clipped_direction=False), "be not rescaled"),
        (with_options(ddim, clipped_direction=False), "eps read through x0's column"),
        (dpmpp_2m, "slots off by one"),
        (dpmpp_3m_sde, "slots off by one"),
        (heun, "slots off by one"),
        (heun, "history of this row's alpha"),
        (ddim, "alphas in ratio, not sigmas"),
        (heun, "memory not written"),
        (dpmpp_2m, "memory not written"),
        (dpmpp_3m_sde, "memory not written"),
    ],
)
def test_promise_catches_bugs_of_plan_itself(solver, name):
    for predicts in ("eps", "v"):
        rows = plan(linear(), predicts, solver, steps=20)
        check(rows, None, "good")
        with pytest.raises(ValueError, match="bad breaks its promise at row"):
            check(change_rows(rows, name), None, "bad")


def two_stage_sde(grid, s_factor=1.0):
    """DPM-Solver++(2S) with noise in both rows: the memory carries noise of its own row into the next (Lu 2022)."""
    u, v = grid.u[:-1], grid.u[1:]
    m = np.sqrt(u * v)

    def split(a, b):
        up = b * np.sqrt((a - b) * (a + b)) / a
        return np.sqrt(b**2 - up**2), up

    (dm, um), (dv, uv) = split(u, m), split(u, v)
    K = 2 * len(u)
    coef, hist = np.zeros((K, 7)), np.zeros((K, 2))
    coef[0::2, 0], coef[0::2, 1], coef[0::2, 6] = dm / u, 1 - dm / u, um
    hist[0::2, 0] = dv / u
    # the midpoint's x0 for the whole step
    coef[1::2, 1], coef[1::2, 3], coef[1::2, 6] = 1 - dv / u, 1.0, uv * s_factor
    end = np.tile([0.0, 1.0], len(u))
    return Table(np.stack([u, m], axis=1).ravel(), coef, hist, end)


def noisy_memory(grid, s_factor=1.0):
    """Remembers x itself, fresh noise included, and returns part of it one row later; noise tops up what is missing."""
    u, v = grid.u[:-1], grid.u[1:]
    K = len(u)
    coef, hist = np.zeros((K, 7)), np.tile([1.0, 0.0], (K, 1))
    # over a basis of K + 1 noises: row k is y_k, of norm u_k
    noise = np.zeros((K + 1, K + 1))
    noise[0, 0] = u[0]
    for k in range(K):
        share = 0.2 * v[k] / u[k - 1] if k else 0.0
        coef[k, 0], coef[k, 3] = 0.5 * v[k] / u[k], share
        coef[k, 1] = 1 - coef[k, 0] - share
        kept = coef[k, 0] * noise[k] + share * noise[k - 1]
        drawn = np.sqrt(v[k] ** 2 - kept @ kept)
        coef[k, 6] = drawn * s_factor
        noise[k + 1] = kept
        noise[k + 1, k + 1] = drawn
    return Table(u, coef, hist, np.ones(K))


@pytest.mark.parametrize("solver", [two_stage_sde, noisy_memory], ids=lambda f: f.__name__)
def test_promise_follows_whose_noise_the_memory_carries(solver):
    for s in (edm(), linear(), vp()):
        for steps in (1, 2, 5, 40):
            t = times(s, steps, "exponential" if s.prior is None else None, final="first")
            if len(set(t)) > 1:
                plan(s, "v", solver, times=t)
                with pytest.raises(ValueError, match="breaks its promise"):
                    plan(s, "v", solver, times=t, s_factor=1 + 1e-9)


def test_declared_solver_without_declaration_and_with_a_wrong_one():
    def langevin(grid, declare=1.0):
        """One step per level that halves eps and adds the level's own noise: leaves the marginals on purpose."""
        u, v = grid.u[:-1], grid.u[1:]
        coef = np.zeros((len(u), 7))
        coef[:, 0], coef[:, 1], coef[:, 6] = 0.5, 0.5, v
        table = Table(u, coef, np.zeros((len(u), 2)), np.ones(len(u)))
        if not declare:
            return table
        a = grid.alpha[1:]
        return table._replace(declared=np.stack([a, declare * 0.5 * u * a, (v * a) ** 2], axis=1))

    assert len(plan(vp(), "eps", langevin, steps=8)) == 9
    with pytest.raises(ValueError, match="langevin breaks its promise at row 0: noise SIGMA should be"):
        plan(vp(), "eps", langevin, steps=8, declare=0.0)
    with pytest.raises(ValueError, match="weight of eps should be"):
        plan(vp(), "eps", langevin, steps=8, declare=1.001)


def test_gaussian_ends_where_its_ode_ends():
    # all solvers agree on the same closed form when the grid is fine
    for s, predicts in ((edm(), "edm"), (vp(), "eps"), (linear(), "v"), (flow(), "flow")):
        for solver in (ddim, euler, heun, dpmpp_2m, partial(dpmpp_3m_sde, eta=0.0)):
            t = s.inverse(np.geomspace(10, 0.05, 257))
            rows = plan(s, predicts, solver, times=t)
            start = np.sqrt(0.36 + 100) * rows[0, row.ALPHA]
            end = np.sqrt(0.36 + 0.0025) * rows[-1, row.ALPHA]
            np.testing.assert_allclose(run(rows, start, denoiser), end, rtol=3e-2 if solver in (ddim, euler) else 3e-4)
