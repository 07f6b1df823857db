"""What every column of a row holds, the limit row of pure noise, and what a user is told."""

from __future__ import annotations

import time

import numpy as np
import pytest

from fastdiff import row
from fastdiff.tables.plan import plan
from fastdiff.tables.schedule import (
    cosine,
    edm,
    flow,
    levels,
    linear,
    schedule,
    sigmoid,
    times,
    vp,
)
from fastdiff.tables.solvers import (
    SOLVERS,
    Table,
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
from tests.tables.configs import CONFIGS, edits, mutated, planned
from tests.tables.gaussian import run

ZERO_SNR = schedule(lambda t: np.sqrt(1 - ((t + 1) / 40) ** 2), lambda t: (t + 1) / 40, T=40, name="zero_snr")


# ---- what the columns hold


def test_rows_of_ddim_in_full():
    s, t = linear(), np.array([999, 499, 99, -1.0])
    a, b = s.alpha(t), s.sigma(t)
    rows = plan(s, "eps", ddim, times=t, clip=1.0, w=3.0)
    want = np.zeros((4, row.COLUMNS))
    want[:, row.T] = [999, 499, 99, 0]
    want[:, row.C_IN] = 1
    want[:3, row.C_SKIP], want[:3, row.C_OUT] = 1 / a[:3], -b[:3] / a[:3]
    want[:3, row.W] = 3
    want[:3, row.A] = b[1:] / b[:3]
    want[:3, row.B0] = a[1:] - a[:3] * b[1:] / b[:3]
    want[:, row.ALPHA], want[:, row.SIGMA] = a, b
    want[:, row.SLOT] = [0, 1, 2, 0]
    want[:, row.CLIP] = [1, 1, 1, np.inf]
    want[:, row.END] = [1, 1, 1, 0]
    np.testing.assert_allclose(rows, want, rtol=1e-13, atol=0)
    np.testing.assert_allclose(rows[:3, row.A], b[1:] / b[:3], rtol=5e-16, atol=0)
    np.testing.assert_array_equal(rows[:, [row.ALPHA, row.SIGMA]], np.stack([a, b], axis=1))


def test_unclipped_direction_is_two_columns_of_the_output():
    s, t = vp(), np.array([0.9, 0.4, 0.1])
    a, b = s.alpha(t), s.sigma(t)
    rows = plan(s, "eps", ddim, times=t, clipped_direction=False)
    np.testing.assert_array_equal(rows[:2, row.A], 0)
    np.testing.assert_allclose(rows[:2, [row.B0, row.BF]], np.stack([a[1:], b[1:]], axis=1), rtol=1e-14)
    x, F = np.random.default_rng(0).standard_normal((2, 7))
    for predicts in ("eps", "x0", "v", "flow", "edm", "score"):
        for eta in (0.0, 0.6):
            one, other = (plan(s, predicts, ddim, times=t, eta=eta, clipped_direction=c)[:2] for c in (True, False))
            for k in range(2):
                ends = [
                    r[k, row.A] * x + r[k, row.B0] * (r[k, row.C_SKIP] * x + r[k, row.C_OUT] * F) + r[k, row.BF] * F
                    for r in (one, other)
                ]
                np.testing.assert_allclose(ends[0], ends[1], rtol=0, atol=2e-12)


def test_guidance_weight_may_depend_on_u():
    rows = plan(linear(), "eps", ddim, steps=10, w=lambda u: 3.0 if 0.2 < u < 5 else 1.0)
    u = rows[:-1, row.SIGMA] / rows[:-1, row.ALPHA]
    np.testing.assert_array_equal(rows[:-1, row.W], np.where((u > 0.2) & (u < 5), 3, 1))
    assert set(rows[:-1, row.W]) == {1, 3}
    seen = []
    plan(flow(), "flow", ddim, steps=2, w=lambda u: seen.append(u) or 1.0)
    assert seen == [np.inf, 1.0]


def test_last_line_is_the_result():
    for s, predicts, last in ((edm(), "edm", np.log(0.002) / 4), (linear(), "eps", 0), (flow(), "flow", 0)):
        rows = plan(s, predicts, dpmpp_2m, steps=5, clip=1.0)
        line = np.zeros(row.COLUMNS)
        line[row.T], line[row.ALPHA], line[row.CLIP] = last, 1, np.inf
        line[row.C_IN] = 2 if predicts == "edm" else 1  # 1/sigma_data
        np.testing.assert_allclose(rows[-1], line, rtol=1e-15)
    rows = plan(edm(), "edm", heun, steps=5)
    np.testing.assert_allclose(rows[:-1, row.T], np.log(rows[:-1, row.SIGMA]) / 4, rtol=1e-15)
    np.testing.assert_allclose(rows[:-1, row.C_IN], 1 / np.sqrt(rows[:-1, row.SIGMA] ** 2 + 0.25), rtol=1e-15)


def test_mean_prediction_knows_the_step_before_of_the_schedule_not_of_the_grid():
    s = linear()
    rows = plan(s, "mean", ddim, times=[500, 300, 0, -1])
    for k, t in enumerate((500.0, 300.0, 0.0)):
        a, b, a1, b1 = (f(np.array(r)) for r in (t, t - 1) for f in (s.alpha, s.sigma))
        beta = 1 - (a / a1) ** 2
        x0, x = 0.37, 1.21
        mean = a1 * beta / b**2 * x0 + a / a1 * b1**2 / b**2 * x
        np.testing.assert_allclose(rows[k, row.C_SKIP] * x + rows[k, row.C_OUT] * mean, x0, rtol=1e-10)
    with pytest.raises(ValueError, match="knows whole steps"):
        plan(s, "mean", ddim, steps=5, spacing="karras")
    assert len(plan(s, "mean", ddim, steps=5, spacing="karras", quantize=True)) == 6


def three_lags(grid):
    """Not a method: reads every lag with weights that keep the signal, to see where the slots go."""
    u, v = grid.u[:-1], grid.u[1:]
    K = len(u)
    coef = np.zeros((K, 7))
    coef[:, 0], coef[:, 1] = v / u, 1 - v / u
    for lag, share in ((1, 0.3), (2, -0.2), (3, 0.1)):
        coef[lag:, 2 + lag] += share
        coef[lag:, 1] -= share
    return Table(u, coef, np.tile([0.0, 1.0], (K, 1)), np.ones(K))


def test_slots_never_move_and_hold_what_the_lag_says():
    s = vp()
    rows = plan(s, "x0", three_lags, steps=9)
    table = three_lags(levels(s, times(s, 9)))
    x = np.array([0.4, -1.3])
    y, alpha, seen = x / rows[0, row.ALPHA], rows[:, row.ALPHA], []
    for k, c in enumerate(table.coef):
        x0 = np.tanh(alpha[k] * y + k)
        y = c[0] * y + c[1] * x0 + sum(c[2 + lag] * seen[-lag] for lag in (1, 2, 3) if c[2 + lag] != 0)
        seen.append(x0)
    steps = iter(range(9))
    got = run(rows, x, lambda x, line: np.tanh(x + next(steps)))
    np.testing.assert_allclose(got, y * alpha[-1], rtol=1e-13)
    np.testing.assert_array_equal(rows[:-1, row.SLOT], np.arange(9) % 3)
    # row 5 reads lag 1, 2, 3 from the slots of rows 4, 3, 2: columns B2, B1, B3
    np.testing.assert_allclose(rows[5, [row.B2, row.B1, row.B3]], np.array([0.3, -0.2, 0.1]) * alpha[6], rtol=1e-14)
    # the last row's memory is read by nobody
    np.testing.assert_array_equal(rows[:-1, row.Q], [1] * 8 + [0])


def test_what_nobody_reads_is_not_written():
    assert not plan(linear(), "eps", ddim, steps=5)[:, [row.P, row.Q]].any()
    rows = plan(edm(), "edm", heun, steps=4)
    np.testing.assert_array_equal(rows[:, row.P] != 0, [1, 0, 1, 0, 1, 0, 0, 0])
    # the row to clean data reads no history
    for solver in (dpmpp_2m, dpmpp_3m_sde):
        np.testing.assert_array_equal(plan(edm(), "edm", solver, steps=5)[:, row.Q], [1, 1, 1, 0, 0, 0])


# ---- a first level of pure noise


@pytest.mark.parametrize("s", [flow(), cosine(T=None), sigmoid(T=None), ZERO_SNR], ids=lambda s: s.name)
@pytest.mark.parametrize(("config"), CONFIGS, ids=lambda c: f"{c[0].__name__}-{c[1]}")
def test_first_row_from_pure_noise_is_the_limit(s, config):
    solver, options = config
    noisy = solver in (ddpm, euler_ancestral) or options.get("algorithm", "").startswith("sde")
    eta = 1.0 if noisy else options.get("eta", 0.0)
    if solver is dpmpp_3m_sde:
        # a = (v/u)^(1 + eta) leaves nothing of the state
        eta = float(options.get("eta", 1.0) > 0)
    for steps in (1, 2, 3, 20):
        rows = planned(s, times(s, steps), config)
        alpha, sigma = rows[1, row.ALPHA], rows[1, row.SIGMA]
        d = eta * sigma
        learned = options.get("variance") == "learned_range"
        np.testing.assert_allclose(rows[0, row.A], np.sqrt(sigma**2 - d**2), rtol=1e-14)
        np.testing.assert_allclose(rows[0, row.B0], alpha, rtol=1e-14)
        np.testing.assert_allclose(rows[0, row.S] * (np.exp(rows[0, row.V0] / 2) if learned else 1), d, rtol=1e-14)
        assert not rows[0, [row.P, row.Q, row.BF]].any()
        assert not rows[min(1, steps - 1), row.B1 : row.B3 + 1].any()  # history starts after it
        assert rows[0, [row.ALPHA, row.SIGMA]].tolist() == [0, 1]
    # the row is the limit of ever noisier first levels
    if s.T is None and solver in (ddim, dpmpp_2m, dpmpp_3m_sde):
        near = planned(s, [1 - 1e-12, 0.6, 0.2], config)[0]
        exact = planned(s, [1.0, 0.6, 0.2], config)[0]
        keep = [row.A, row.S] if options.get("clipped_direction", True) else [row.S]
        # at eta = 0.5 a is the root of a small v/u
        slow = solver is dpmpp_3m_sde and eta == 1 and "eta" in options
        np.testing.assert_allclose(near[keep], exact[keep], rtol=0, atol=1e-3 if slow else 3e-6)


def test_pure_noise_needs_an_output_that_says_x0_and_comes_first_only():
    for predicts in ("eps", "score"):
        with pytest.raises(ValueError, match="says nothing about x0 at alpha = 0"):
            plan(flow(), predicts, ddim, steps=3)
    for predicts in ("x0", "v", "flow", "edm"):
        plan(flow(), predicts, heun, steps=3)
    for t in ([0.2, 1.0], [0.2, 1.0, 0.5]):
        with pytest.raises(ValueError, match="only the first level may be pure noise"):
            plan(flow(), "flow", ddim, times=t)


# ---- what users may get wrong, and how long it takes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"churn": 3}, "ddim has no option 'churn'; its options: eta, clipped_direction"),
        ({"clip": 0.0}, "clip must be > 0, got 0.0"),
        ({"times": [5, 1]}, "leave out steps=5"),
        ({"predicts": "epsilon"}, "predicts='epsilon' is not one of eps, x0"),
        ({"solver": dpmpp_2m, "eta": 1.0}, "dpmpp_2m has no option 'eta'; its options: none"),
        ({"solver": lambda grid: ddim(grid)._replace(coef=np.zeros((5, 6)))}, r"coef \(5, 6\)"),
        ({"solver": mutated(ddim, lambda coef, *_: coef.__setitem__((0, 3), 1.0))}, "reads a history of 1 row"),
        ({"solver": lambda g: ddim(g)._replace(variance=np.zeros((5, 4))), "predicts": "v+range"}, "Table.declared"),
        ({"solver": mutated(ddim, edits(a=np.nan))}, "breaks its promise at row 0"),
    ],
)
def test_errors(arguments, message):
    given = {"predicts": "eps", "solver": ddim, "steps": 5} | arguments
    with pytest.raises(ValueError, match=message):
        plan(linear(), given.pop("predicts"), given.pop("solver"), **given)


def test_solver_with_keywords_takes_any_option():
    def mine(grid, **options):
        return ddim(grid, **options)

    np.testing.assert_array_equal(
        plan(linear(), "eps", mine, steps=5, eta=0.3), plan(linear(), "eps", ddim, steps=5, eta=0.3)
    )


def test_steps_spacing_and_ends_reach_the_grid():
    rows = plan(linear(), "eps", ddim, spacing="ddim25")
    assert (len(rows), rows[0, row.T], rows[-1, row.SIGMA]) == (26, 960, 0)
    rows = plan(linear(), "eps", ddim, steps=10, spacing="leading", steps_offset=1, final="first")
    np.testing.assert_array_equal(rows[:, row.T], [901, 801, 701, 601, 501, 401, 301, 201, 101, 1, 0])
    rows = plan(vp(), "eps", ddim, steps=10, t_end=0.02, denoise=True)
    np.testing.assert_array_equal(rows[-2:, row.T], [0.02, 0])


def test_a_thousand_rows_take_a_fraction_of_a_second():
    for s, solver, options in ((linear(), ddim, {"eta": 1.0}), (edm(), heun, {"churn": 40.0})):
        steps = 1000 if solver is ddim else 500
        took = []
        for _ in range(3):
            begin = time.perf_counter()
            plan(s, "v", solver, steps=steps, **options)
            took.append(time.perf_counter() - begin)
        assert min(took) < 0.2


def test_solvers_by_name():
    own = (ddim, ddpm, euler, euler_ancestral, heun, dpmpp_2m, dpmpp_3m_sde, dpm_multistep, plms)
    assert {f.__name__: f for f in own} == SOLVERS
    assert list(SOLVERS)[:3] == ["ddim", "ddpm", "euler"]
