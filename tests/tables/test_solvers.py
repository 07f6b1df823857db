"""Each solver against its paper, written as a loop over images, and in order of convergence."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest

from fastdiff import row
from fastdiff.tables.plan import plan
from fastdiff.tables.schedule import cosine, edm, flow, from_betas, levels, linear, times, ve, vp
from fastdiff.tables.solvers import SOLVERS, ddim, ddpm, dpmpp_2m, dpmpp_3m_sde, euler, heun
from tests.tables.gaussian import C, denoiser, net, network, order, run, uneven

SHAPE = (2, 5)

# ---- the papers, as loops


def ho_loop(betas, x, zs, variance, clip):
    """Ho 2020, algorithm 2 with the mean of eq. 7 of a clipped x0, t from T-1 to 0."""
    abar = np.cumprod(1 - betas)
    for t, z in zip(reversed(range(len(betas))), zs, strict=True):
        before = abar[t - 1] if t > 0 else 1.0
        eps = net(x, t)
        x0 = np.clip((x - np.sqrt(1 - abar[t]) * eps) / np.sqrt(abar[t]), -clip, clip)
        mean = np.sqrt(before) * betas[t] / (1 - abar[t]) * x0
        mean = mean + np.sqrt(1 - betas[t]) * (1 - before) / (1 - abar[t]) * x
        tilde = (1 - before) / (1 - abar[t]) * betas[t]
        x = mean + (np.sqrt(betas[t] if variance == "beta" else tilde) * z if t > 0 else 0)
    return x


@pytest.mark.parametrize("variance", ["beta_tilde", "beta"])
@pytest.mark.parametrize("clip", [None, 0.8])
def test_ddpm_is_algorithm_2(rng, variance, clip):
    betas = np.linspace(1e-3, 0.3, 25)
    x, zs = rng.standard_normal(SHAPE), rng.standard_normal((25, *SHAPE))
    rows = plan(from_betas(betas), "eps", ddpm, steps=25, variance=variance, clip=clip)
    want = ho_loop(betas, x, zs, variance, np.inf if clip is None else clip)
    np.testing.assert_allclose(run(rows, x, network, zs), want, rtol=0, atol=1e-11)


def test_learned_range_interpolates_log_variances():
    betas = np.linspace(1e-3, 0.3, 25)
    abar = np.cumprod(1 - betas)
    tilde = betas[1:] * (1 - abar[:-1]) / (1 - abar[1:])
    rows = plan(from_betas(betas), "eps+range", ddpm, steps=25, variance="learned_range")
    # noise first: t = 24..0; the first step takes the second's beta_tilde
    np.testing.assert_allclose(rows[:-1, row.V0], np.log(np.append(tilde[:1], tilde))[::-1], rtol=1e-12)
    np.testing.assert_allclose(rows[:-1, row.V1], np.log(betas)[::-1], rtol=1e-12)
    np.testing.assert_array_equal(rows[:-1, row.S], [1.0] * 24 + [0.0])
    np.testing.assert_array_equal(rows[:, [row.V2, row.V3]], 0)
    fixed = plan(from_betas(betas), "eps", ddpm, steps=25)
    np.testing.assert_array_equal(rows[:, [row.A, row.B0]], fixed[:, [row.A, row.B0]])
    with pytest.raises(ValueError, match=r"use 'eps\+range'"):
        plan(linear(), "eps", ddpm, steps=5, variance="learned_range")


def test_ddim_with_eta_one_is_ddpm():
    for s in (linear(), vp(), edm()):
        one, other = plan(s, "v", ddim, steps=17, eta=1.0), plan(s, "v", ddpm, steps=17)
        np.testing.assert_allclose(one[:, :20], other[:, :20], rtol=1e-12, atol=1e-14)


def karras_loop(sigmas, x, zs, churn, s_min, s_max, s_noise, second):
    """Karras 2022, algorithm 2, on sigma with D(x) = net read as x0; zs[i] is the churn noise of step i."""
    n = len(sigmas) - 1
    D = lambda x, s: net(x, np.log(s) / 4)  # noqa: E731
    for i in range(n):
        t, t_next = sigmas[i], sigmas[i + 1]
        gamma = min(churn / n, np.sqrt(2) - 1) if s_min <= t <= s_max else 0.0
        t_hat = t + gamma * t
        x_hat = x + np.sqrt(t_hat**2 - t**2) * s_noise * zs[i]
        d = (x_hat - D(x_hat, t_hat)) / t_hat
        x = x_hat + (t_next - t_hat) * d
        if second and t_next > 0:
            d_next = (x - D(x, t_next)) / t_next
            x = x_hat + (t_next - t_hat) * (d / 2 + d_next / 2)
    return x


@pytest.mark.parametrize("solver", [euler, heun], ids=["euler", "heun"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"churn": 40.0},
        {"churn": 3.0, "s_min": 0.05, "s_max": 20.0, "s_noise": 1.007},
        {"churn": 5.0, "s_max": 10.0},
    ],
)
def test_euler_and_heun_are_karras_algorithm_2(rng, solver, options):
    n = 11
    sigmas = times(edm(), n)
    full = {"churn": 0.0, "s_min": 0.0, "s_max": np.inf, "s_noise": 1.0} | options
    zs, x = rng.standard_normal((n, *SHAPE)), 80 * rng.standard_normal(SHAPE)
    want = karras_loop(sigmas, x, zs, **full, second=solver is heun)
    rows = plan(edm(), "x0", solver, steps=n, **options)
    # our first row receives the state with its churn noise; each later one's is drawn by the row before it
    start = x + np.sqrt(max(rows[0, row.SIGMA] ** 2 - 80.0**2, 0)) * full["s_noise"] * zs[0]
    per_row = iter(zs[1:])
    draws = [
        next(per_row) if end and k < len(rows) - 2 else np.zeros(SHAPE) for k, end in enumerate(rows[:-1, row.END])
    ]
    np.testing.assert_allclose(run(rows, start, network, draws), want, rtol=0, atol=1e-11)
    assert len(rows) - 1 == (2 * n - 1 if solver is heun else n)
    assert rows[:-1, row.END].sum() == n


def test_heun_rows_come_in_pairs():
    rows = plan(edm(), "edm", heun, steps=3)
    np.testing.assert_array_equal(rows[:, row.END], [0, 1, 0, 1, 1, 0])
    np.testing.assert_array_equal(rows[[1, 3], row.SIGMA], rows[[2, 4], row.SIGMA])  # the stage is at the next level
    churned = plan(edm(), "edm", heun, steps=3, churn=1.5, s_min=1.0)
    np.testing.assert_allclose(churned[[0, 2], row.SIGMA], rows[[0, 2], row.SIGMA] * 2**0.5, rtol=1e-14)
    assert churned[4, row.SIGMA] == 0.002  # below s_min


def lu_loop(alphas, sigmas, ts, x):
    """Lu 2022 (DPM-Solver++), algorithm 2 with data prediction, lambda = log(alpha/sigma); the end is clean."""
    lam = np.log(alphas[:-1] / sigmas[:-1])
    before = None
    for i in range(1, len(alphas)):
        x0 = net(x, ts[i - 1])
        if i == len(alphas) - 1:
            return x0
        h = lam[i] - lam[i - 1]
        D = x0
        if before is not None:
            r = (lam[i - 1] - lam[i - 2]) / h
            D = (1 + 1 / (2 * r)) * x0 - 1 / (2 * r) * before
        x = sigmas[i] / sigmas[i - 1] * x - alphas[i] * np.expm1(-h) * D
        before = x0
    return x


def test_dpmpp_2m_is_lu_algorithm_2(rng):
    for s in (linear(), cosine()):
        t = times(s, 12)
        x = rng.standard_normal(SHAPE)
        want = lu_loop(s.alpha(t), s.sigma(t), np.maximum(t, 0), x)
        got = run(plan(s, "x0", dpmpp_2m, steps=12), x, network)
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-12)
        assert (plan(s, "x0", dpmpp_2m, steps=12)[-2, [row.A, row.B0, row.B1, row.B2, row.B3]] == [0, 1, 0, 0, 0]).all()


def lu_sde_loop(alphas, sigmas, ts, x, zs, eta, corrected):
    """Lu 2022 (DPM-Solver++), third order with data prediction, as an SDE as in k-diffusion; the end is clean.

    phi_2 = (e^-k - 1)/k + 1, phi_3 = phi_2/k - 1/2; D1, D2 are differences of x0 in steps of h.
    """
    lam = np.log(alphas[:-1] / sigmas[:-1])
    seen = []
    for i in range(1, len(alphas)):
        seen.insert(0, net(x, ts[i - 1]))
        if i == len(alphas) - 1:
            return seen[0]
        h = lam[i] - lam[i - 1]
        k = (1 + eta) * h
        phi_2 = (np.exp(-k) - 1) / k + 1
        phi_3 = phi_2 / k - 0.5
        y = sigmas[i] / sigmas[i - 1] * np.exp(-eta * h) * x - alphas[i] * (np.exp(-k) - 1) * seen[0]
        if i >= 2:
            r0 = (lam[i - 1] - lam[i - 2]) / h
            D1_0 = D1 = (seen[0] - seen[1]) / r0
        if i >= 3:
            r1 = (lam[i - 2] - lam[i - 3]) / h
            D1_1 = (seen[1] - seen[2]) / r1
            D1 = D1_0 + r0 / (r0 + r1) * (D1_0 - D1_1)
            D2 = (D1_0 - D1_1) / (r0 + r1)
            y = y - alphas[i] * phi_3 * D2 * (2 if corrected else 1)
        if i >= 2:
            y = y + alphas[i] * phi_2 * D1
        x = y + sigmas[i] * np.sqrt(1 - np.exp(-2 * eta * h)) * zs[i - 1]


@pytest.mark.parametrize("corrected", [False, True], ids=["published", "corrected"])
@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0, 2.5])
def test_dpmpp_3m_sde_is_lu_with_noise(rng, eta, corrected):
    for s in (linear(), cosine()):
        t = times(s, 12)
        x, zs = rng.standard_normal(SHAPE), rng.standard_normal((12, *SHAPE))
        want = lu_sde_loop(s.alpha(t), s.sigma(t), np.maximum(t, 0), x, zs, eta, corrected)
        rows = plan(s, "x0", dpmpp_3m_sde, steps=12, eta=eta, corrected=corrected)
        np.testing.assert_allclose(run(rows, x, network, zs), want, rtol=0, atol=1e-12)
        np.testing.assert_array_equal(rows[-2, [row.A, row.B0, row.B1, row.B2, row.B3, row.S]], [0, 1, 0, 0, 0, 0])


def test_dpmpp_3m_sde_draws_the_noise_of_ddpm():
    for s in (linear(), vp(), edm()):
        one, other = plan(s, "v", dpmpp_3m_sde, steps=17), plan(s, "v", ddpm, steps=17)
        same = [row.A, row.S, row.ALPHA, row.SIGMA]
        np.testing.assert_allclose(one[:, same], other[:, same], rtol=1e-12, atol=1e-14)
        np.testing.assert_allclose(one[0], other[0] + (np.arange(row.COLUMNS) == row.Q), rtol=1e-12, atol=1e-14)


def test_dpmpp_3m_sde_takes_levels_that_repeat_or_turn():
    # a step of length 0 or back in history leaves fewer points to interpolate, never a division by zero
    for corrected in (False, True):
        options = {"eta": 0.0, "corrected": corrected}
        rows = plan(linear(), "eps", dpmpp_3m_sde, times=[900, 700, 700, 500, 300, 100, -1], **options)
        np.testing.assert_array_equal((rows[:-1, row.B1 : row.B3 + 1] != 0).sum(axis=1), [0, 0, 0, 1, 2, 0])
        rows = plan(linear(), "eps", dpmpp_3m_sde, times=[100, 300, 100, 300, 500, 700], **options)
        np.testing.assert_array_equal((rows[:-1, row.B1 : row.B3 + 1] != 0).sum(axis=1), [0, 1, 1, 1, 2])


# ---- order of convergence

ORDERS = [
    (ddim, 1, 0.15),
    (partial(ddim, clipped_direction=False), 1, 0.15),
    (euler, 1, 0.15),
    (heun, 2, 0.15),
    (dpmpp_2m, 2, 0.15),
]


@pytest.mark.parametrize("invert", [False, True], ids=["forward", "inversion"])
@pytest.mark.parametrize("s", [edm(), ve(), vp(), linear(), flow(), cosine(T=None)], ids=lambda s: f"{s.name}-{s.T}")
@pytest.mark.parametrize(("solver", "want", "within"), ORDERS)
def test_order_of_convergence(solver, want, within, s, invert):
    assert abs(order(s, solver, invert=invert) - want) <= within


# a third order is seen on finer grids: at n = 256 the two leading terms of the error are alike
MULTISTEP = [
    (partial(dpmpp_3m_sde, eta=0.0), 2, 256),
    (partial(dpmpp_3m_sde, eta=0.0, corrected=True), 3, 2048),
]


@pytest.mark.parametrize("invert", [False, True], ids=["forward", "inversion"])
@pytest.mark.parametrize("s", [edm(), vp(), linear(), cosine(T=None)], ids=lambda s: f"{s.name}-{s.T}")
@pytest.mark.parametrize(("solver", "want", "finest"), MULTISTEP, ids=["published", "corrected"])
def test_order_of_multistep_from_exact_history(solver, want, finest, s, invert):
    assert abs(order(s, solver, invert=invert, before=2, finest=finest) - want) <= 0.15


def deviation(rows):
    """Of the Gaussian's state at the end, exactly: the loop is linear in the first state and the noise of each row."""
    noises = np.eye(len(rows))
    begin, end = np.hypot(C * rows[[0, -1], row.ALPHA], rows[[0, -1], row.SIGMA])
    return np.linalg.norm(run(rows, begin * noises[0], denoiser, noises[1:])) / end


@pytest.mark.parametrize(
    ("solver", "want"),
    [
        (partial(ddim, eta=1.0), 1),
        (partial(dpmpp_3m_sde, eta=0.5), 2),
        (dpmpp_3m_sde, 2),
        (partial(dpmpp_3m_sde, corrected=True), 2),
    ],
)
def test_variance_of_noisy_solvers_converges(solver, want):
    for s in (edm(), linear()):
        errors = [deviation(plan(s, "v", solver, times=uneven(s, n))) - 1 for n in (256, 512)]
        assert abs(np.log2(errors[0] / errors[1]) - want) <= 0.15


# ---- edges


def test_equal_levels_are_identity_rows(rng):
    x = rng.standard_normal(SHAPE)
    for name, solver in SOLVERS.items():
        rows = plan(linear(), "eps", solver, times=[500, 500])
        np.testing.assert_allclose(run(rows, x, network, np.ones((2, *SHAPE))), x, rtol=1e-15, err_msg=name)
    # first level twice at the end of an inversion's start, and diffusers' last step without alpha 1
    for s in ("beta_tilde", "beta", "learned_range"):
        rows = plan(linear(), "eps+range", ddpm, times=[20, 0, 0], variance=s)
        np.testing.assert_array_equal(rows[1, [row.A, row.B0, row.S]], [1, 0, 0])
    rows = plan(linear(), "eps", dpmpp_2m, times=[0, 0, 20, 40])
    np.testing.assert_array_equal(rows[0, [row.A, row.B0, row.B1, row.B2, row.B3]], [1, 0, 0, 0, 0])


def test_solvers_that_draw_noise_do_not_invert():
    grid = levels(linear(), [10, 500])
    for solver, options, words in (
        (ddpm, {}, "ddpm draws noise"),
        (ddim, {"eta": 0.5}, "ddim with eta=0.5 draws noise"),
        (euler, {"churn": 2.0}, "euler with churn=2 draws noise"),
        (heun, {"churn": 2.0}, "heun with churn=2 draws noise"),
        (dpmpp_3m_sde, {"eta": 0.5}, "dpmpp_3m_sde with eta=0.5 draws noise"),
    ):
        with pytest.raises(ValueError, match=words + " and cannot run towards more"):
            solver(grid, **options)
    for solver in SOLVERS.values():
        with pytest.raises(ValueError, match=r'cannot leave clean data.*final="first"'):
            solver(levels(linear(), [-1, 10, 500]))


def test_inversion_and_back_is_exact_where_eps_is_constant(rng):
    # with eps fixed the probability flow is a straight line in u, which ddim, euler and heun follow exactly
    eps = rng.standard_normal(SHAPE)
    t = times(linear(), 20, final="first")
    x = rng.standard_normal(SHAPE)
    for solver in (ddim, euler, heun):
        up = run(plan(linear(), "eps", solver, times=t[::-1]), x, lambda x, line: eps)
        u = linear().sigma(t) / linear().alpha(t)
        y = x / linear().alpha(t[-1:]) + (u[0] - u[-1]) * eps
        np.testing.assert_allclose(up, y * linear().alpha(t[:1]), rtol=1e-12)
        np.testing.assert_allclose(run(plan(linear(), "eps", solver, times=t), up, lambda x, line: eps), x, rtol=1e-10)


@pytest.mark.parametrize(
    ("solver", "options", "message"),
    [
        (ddim, {"eta": -0.1}, "eta must be >= 0, got -0.1"),
        (ddim, {"eta": 1.5}, "eta=1.5 draws more noise than the level"),
        (dpmpp_3m_sde, {"eta": -0.1}, "eta must be >= 0 and finite, got -0.1"),
        (dpmpp_3m_sde, {"eta": float("inf")}, "eta must be >= 0 and finite, got inf"),
        (ddpm, {"variance": "large"}, "variance='large' of ddpm is not one of"),
        (heun, {"churn": -1.0}, "churn must be >= 0, got -1.0"),
        (euler, {"churn": float("nan")}, "churn must be >= 0, got nan"),
    ],
)
def test_options_out_of_range(solver, options, message):
    with pytest.raises(ValueError, match=message):
        solver(levels(linear(), times(linear(), 10)), **options)


def test_quantized_churn_stays_on_the_schedules_levels():
    rows = plan(linear(), "eps", heun, steps=20, churn=8.0, quantize=True)
    np.testing.assert_array_equal(rows[:, row.T], np.rint(rows[:, row.T]))
    own = linear().sigma(rows[:-1, row.T])
    np.testing.assert_allclose(rows[:-1, row.SIGMA], own, rtol=1e-15)
    assert (rows[:-1, row.S] > 0).any()
