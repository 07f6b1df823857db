"""DPM-Solver's forms and PLMS: orders of convergence, their last steps, what they remember, and planted bugs."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest

from fastdiff import row
from fastdiff.tables.plan import exploding, plan
from fastdiff.tables.schedule import cosine, edm, levels, linear, times, vp
from fastdiff.tables.solvers import ddim, dpm_multistep, dpmpp_2m, dpmpp_3m_sde, euler_ancestral, plms
from tests.tables.configs import mutated
from tests.tables.gaussian import denoiser, error, net, network, order, run, uneven
from tests.tables.test_solvers import deviation

SHAPE = (2, 5)
# the published third orders measure 2, in either form: their D2 lacks a factor 2
ORDERS = [("dpmsolver++", 1, 1), ("dpmsolver++", 2, 2), ("dpmsolver++", 3, 2)]
ORDERS += [("dpmsolver", 1, 1), ("dpmsolver", 2, 2), ("dpmsolver", 3, 2)]


@pytest.mark.parametrize("invert", [False, True], ids=["forward", "inversion"])
@pytest.mark.parametrize("kind", ["midpoint", "heun"])
@pytest.mark.parametrize(("algorithm", "steps", "want"), ORDERS)
def test_order_of_dpm_multistep(algorithm, steps, want, kind, invert):
    for s in (edm(), linear()):
        solver = partial(dpm_multistep, algorithm=algorithm, order=steps, kind=kind)
        assert abs(order(s, solver, before=2, invert=invert) - want) <= 0.05


@pytest.mark.parametrize("kind", ["midpoint", "heun"])
@pytest.mark.parametrize("algorithm", ["sde-dpmsolver++", "sde-dpmsolver"])
def test_variance_of_the_sdes_converges_with_order_2(algorithm, kind):
    solver = partial(dpm_multistep, algorithm=algorithm, order=2, kind=kind)
    for s in (edm(), linear()):
        errors = [deviation(plan(s, "v", solver, times=uneven(s, n))) - 1 for n in (256, 512)]
        assert abs(np.log2(errors[0] / errors[1]) - 2) <= 0.15


def even(s, n):
    return s.inverse(10 * np.exp(np.linspace(0, 1, n + 1) * np.log(0.05 / 10)))


@pytest.mark.parametrize("options", [{}, {"twice": False}, {"clipped_direction": False}], ids=str)
@pytest.mark.parametrize(("steps", "want"), [(1, 1), (2, 2), (3, 2), (4, 2)])
def test_order_of_plms_on_even_steps(steps, want, options):
    for s in (edm(), vp(), linear()):
        solver = partial(plms, order=steps, **options)
        errors = [error(plan(s, "v", solver, times=even(s, n))) for n in (128, 256)]
        assert abs(np.log2(errors[0] / errors[1]) - want) <= 0.1
        # its weights take all steps as equal
        assert abs(order(s, solver) - 1) <= 0.1


def adams_loop(u, x, twice):
    """Adams-Bashforth on dy/du = eps for equal steps; the first step by Heun's, whose second slope is forgotten."""
    w = [[1], [3 / 2, -1 / 2], [23 / 12, -16 / 12, 5 / 12], [55 / 24, -59 / 24, 37 / 24, -9 / 24]]
    slopes = []
    slope = lambda y, i: (y - net(y, np.log(u[i]) / 4)) / u[i]  # noqa: E731
    for i in range(len(u) - 1):
        slopes.insert(0, slope(x, i))
        y = x + (u[i + 1] - u[i]) * sum(a * e for a, e in zip(w[min(i, 3)], slopes, strict=False))
        if i == 0 and twice:
            y = x + (u[1] - u[0]) * (slopes[0] + slope(y, 1)) / 2
        x = y
    return x


@pytest.mark.parametrize("twice", [True, False])
def test_plms_is_adams_bashforth(rng, twice):
    u = np.linspace(8.0, 0.5, 9)
    x = rng.standard_normal(SHAPE)
    rows = plan(edm(), "x0", plms, times=u, twice=twice)
    np.testing.assert_allclose(run(rows, x, network), adams_loop(u, x, twice), rtol=0, atol=1e-12)
    assert len(rows) == 9 + twice
    assert list(rows[:3, row.END]) == ([0, 1, 1] if twice else [1, 1, 1])
    # eps from the network as it is: the same while nothing is clipped
    plain = plan(edm(), "x0", plms, times=u, twice=twice, clipped_direction=False)
    np.testing.assert_allclose(run(plain, x, network), adams_loop(u, x, twice), rtol=0, atol=1e-12)
    assert (plain[:-1, row.BF] != 0).all()


def test_the_same_methods_by_other_names(rng):
    for s in (linear(), cosine()):
        for steps in (5, 20):
            one = plan(s, "eps", dpm_multistep, steps=steps, ends=())
            np.testing.assert_array_equal(one, plan(s, "eps", dpmpp_2m, steps=steps))
            options = {"order": 3, "algorithm": "sde-dpmsolver++", "kind": "heun", "ends": ()}
            one = plan(s, "eps", dpm_multistep, steps=steps, **options)
            np.testing.assert_array_equal(one, plan(s, "eps", dpmpp_3m_sde, steps=steps))
            one = plan(s, "eps", dpm_multistep, steps=steps, order=1)
            np.testing.assert_allclose(one[:, :11], plan(s, "eps", ddim, steps=steps)[:, :11], rtol=1e-12, atol=1e-14)
            one = plan(s, "eps", dpm_multistep, steps=steps, order=1, algorithm="dpmsolver", final="first")
            other = plan(s, "eps", ddim, steps=steps, final="first")
            np.testing.assert_allclose(one[:, :11], other[:, :11], rtol=1e-12, atol=1e-14)
            one, other = plan(s, "v", euler_ancestral, steps=steps), plan(s, "v", ddim, steps=steps, eta=1.0)
            np.testing.assert_array_equal(one, other)


def points(rows):
    """How many values of the network each row uses."""
    return 1 + (rows[:-1, row.B1 : row.B3 + 1] != 0).sum(axis=1)


def test_last_steps_take_lower_orders():
    t = times(linear(), 20, final="first")
    assert list(points(plan(linear(), "eps", dpm_multistep, times=t, order=3)))[-3:] == [3, 3, 3]
    assert list(points(plan(linear(), "eps", dpm_multistep, times=t, order=3, ends=(2, 1))))[-3:] == [3, 2, 1]
    assert list(points(plan(linear(), "eps", dpm_multistep, times=t, order=3, ends=(1,))))[-3:] == [3, 3, 1]
    assert list(points(plan(linear(), "eps", dpm_multistep, times=t, order=2, ends=(3, 2)))) == [1] + [2] * 19
    assert list(points(plan(linear(), "eps", dpm_multistep, times=t[:15], order=3)))[-3:] == [3, 2, 1]
    assert list(points(plan(linear(), "eps", dpm_multistep, times=t[:2], order=3, ends=(3, 2, 1)))) == [1]
    assert list(points(plan(linear(), "eps", plms, times=t)))[:6] == [1, 2, 2, 3, 4, 4]


def test_memories_keep_their_slots():
    # the second call of the first step remembers nothing, so eps of the first is still there three steps later
    rows = plan(linear(), "eps", plms, steps=8)
    wrote = rows[:-1, row.P] != 0
    assert list(wrote[:5]) == [True, False, True, True, True]
    assert list(rows[:-1, row.SLOT][wrote]) == [i % 3 for i in range(wrote.sum())]
    assert (rows[4, row.B1 : row.B3 + 1] != 0).all()


def swapped(coef, hist, u, v):
    both = (coef[:, 3] != 0) & (coef[:, 4] != 0)
    coef[both, 3], coef[both, 4] = coef[both, 4], coef[both, 3]


def heavier(coef, hist, u, v):
    some = coef[:, 3] != 0
    coef[some, 0] -= 0.2 * coef[some, 3] / u[some]
    coef[some, 1] += 0.2 * coef[some, 3] / u[some]
    coef[:, 3] *= 1.2


@pytest.mark.parametrize(
    ("bug", "solver"),
    [
        (swapped, plms),
        (heavier, plms),
        (heavier, partial(dpm_multistep, algorithm="dpmsolver")),
        (swapped, partial(dpm_multistep, algorithm="dpmsolver", order=3)),
    ],
)
def test_order_catches_what_keeps_the_promise(bug, solver):
    errors = [error(plan(edm(), "v", mutated(solver, bug), times=even(edm(), n))) for n in (256, 512)]
    assert abs(np.log2(errors[0] / errors[1]) - 2) > 0.3
    errors = [error(plan(edm(), "v", solver, times=even(edm(), n))) for n in (256, 512)]
    assert abs(np.log2(errors[0] / errors[1]) - 2) < 0.1


def test_promise_catches_an_sde_without_its_noise():
    solver = partial(dpm_multistep, algorithm="sde-dpmsolver")
    broken = mutated(solver, lambda coef, hist, u, v: coef[:, 6].__imul__(0.99))
    plan(linear(), "eps", solver, steps=20)
    with pytest.raises(ValueError, match="breaks its promise at row 0: noise variance"):
        plan(linear(), "eps", broken, steps=20)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"order": 4}, "order=4"),
        ({"algorithm": "dpm"}, "algorithm='dpm'"),
        ({"kind": "ralston"}, "kind='ralston'"),
        ({"algorithm": "sde-dpmsolver", "order": 3}, "sde-dpmsolver has no order 3"),
    ],
)
def test_dpm_multistep_refuses(options, words):
    with pytest.raises(ValueError, match=words):
        dpm_multistep(levels(linear(), times(linear(), 10)), **options)
    with pytest.raises(ValueError, match="order=5; accepted: 1, 2, 3, 4"):
        plms(levels(linear(), times(linear(), 10)), order=5)


def test_exploding_rows_are_the_same_loop(rng):
    """y = x/alpha from the same rows: Heun's and DPM-Solver's memories, noise and what the network sees."""
    for solver, options in ((dpmpp_3m_sde, {}), (plms, {}), (dpm_multistep, {"algorithm": "dpmsolver"})):
        rows = plan(linear(), "v", solver, times=times(linear(), 9, final="first"), **options)
        other = exploding(rows)
        np.testing.assert_array_equal(other[:, row.ALPHA], 1)
        x, zs = rng.standard_normal(SHAPE), rng.standard_normal((len(rows), *SHAPE))
        got = run(other, x / rows[0, row.ALPHA], network, zs)
        np.testing.assert_allclose(got * rows[-1, row.ALPHA], run(rows, x, network, zs), rtol=0, atol=1e-12)


def test_a_grid_of_levels_is_taken_as_it_is(rng):
    t = times(linear(), 8)
    grid = levels(linear(), t)
    rows = plan(linear(), "eps", dpmpp_2m, grid=grid)
    np.testing.assert_array_equal(rows, plan(linear(), "eps", dpmpp_2m, times=t))
    told = plan(linear(), "eps", dpmpp_2m, grid=grid._replace(t=np.arange(9.0)))
    np.testing.assert_array_equal(told[:, row.T], np.arange(9.0))
    np.testing.assert_array_equal(np.delete(told, row.T, 1), np.delete(rows, row.T, 1))
    with pytest.raises(ValueError, match="leave out steps=8"):
        plan(linear(), "eps", dpmpp_2m, grid=grid, steps=8)


def test_gaussian_ends_where_its_ode_ends():
    for solver in (plms, partial(dpm_multistep, algorithm="dpmsolver", order=3), partial(dpm_multistep, kind="heun")):
        rows = plan(vp(), "eps", solver, times=even(vp(), 256))
        start, end = (np.hypot(0.6 * rows[k, row.ALPHA], rows[k, row.SIGMA]) for k in (0, -1))
        np.testing.assert_allclose(run(rows, start, denoiser), end, rtol=3e-4)
