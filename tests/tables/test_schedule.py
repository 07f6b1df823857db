"""Schedules against the formulas of their papers, written in another way."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from fastdiff.tables import schedule as module
from fastdiff.tables.curve import ratio
from fastdiff.tables.schedule import (
    cosine,
    edm,
    flow,
    from_betas,
    from_spec,
    levels,
    linear,
    scaled_linear,
    schedule,
    sigmoid,
    sub_vp,
    times,
    ve,
    vp,
)

DISCRETE = [linear(), scaled_linear(), cosine(), sigmoid(), linear(T=4000, beta_start=2.5e-5, beta_end=0.005)]
CONTINUOUS = [vp(), scaled_linear(T=None), sub_vp(), ve(), edm(), flow(), cosine(T=None), sigmoid(T=None)]
ALL = [*DISCRETE, *CONTINUOUS]


def named(s):
    return f"{s.name}-{s.T}"


def alpha_bar_by_loop(betas):
    out, product = [], 1.0
    for beta in betas:
        product *= 1 - beta
        out.append(product)
    return np.array(out)


BETAS = {
    "linear": lambda T: [1e-4 + (0.02 - 1e-4) * i / (T - 1) for i in range(T)],
    "scaled_linear": lambda T: [(0.00085**0.5 + (0.012**0.5 - 0.00085**0.5) * i / (T - 1)) ** 2 for i in range(T)],
    "cosine": lambda T: [min(1 - cos_bar((i + 1) / T) / cos_bar(i / T), 0.999) for i in range(T)],
    "sigmoid": lambda T: [min(1 - sig_bar((i + 1) / T) / sig_bar(i / T), 0.999) for i in range(T)],
}


def cos_bar(t, s=0.008):
    return math.cos((t + s) / (1 + s) * math.pi / 2) ** 2


def sig_bar(t, start=-3.0, end=3.0, tau=1.0):
    S = lambda z: 1 / (1 + math.exp(-z / tau))  # noqa: E731
    return (S(end) - S(start + t * (end - start))) / (S(end) - S(start))


@pytest.mark.parametrize("make", [linear, scaled_linear, cosine, sigmoid], ids=lambda f: f.__name__)
def test_discrete_alphas_are_the_products_of_the_paper(make):
    s, t = make(), np.arange(1000.0)
    want = alpha_bar_by_loop(BETAS[make.__name__](1000))
    # the loop's own 1 - abar rounds: relative error 1e-16/sigma^2
    np.testing.assert_allclose(s.alpha(t) ** 2, want, rtol=1e-10)
    np.testing.assert_allclose(s.sigma(t) ** 2, 1 - want, rtol=0, atol=1e-14)
    assert (s.alpha(np.array(-1.0)), s.sigma(np.array(-1.0))) == (1, 0)
    assert (s.t_max, s.t_end, s.prior, s.T) == (999, 0, 1, 1000)
    np.testing.assert_array_equal(s.told(np.array([-1.0, 0, 7.5])), [0, 0, 7.5])


def test_first_sigma_keeps_its_digits():
    # 1 - (1 - 1e-4) loses four digits of beta_0
    np.testing.assert_allclose(linear().sigma(np.zeros(1)), np.sqrt(1e-4), rtol=1e-15)


def test_continuous_formulas():
    t = np.linspace(0.01, 0.99, 23)
    nodes, weights = np.polynomial.legendre.leggauss(40)
    for s, beta in (
        (vp(), lambda r: 0.1 + r * 19.9),
        (linear(T=None), lambda r: 0.1 + r * 19.9),
        (scaled_linear(T=None), lambda r: (0.85**0.5 + r * (12**0.5 - 0.85**0.5)) ** 2),
    ):
        B = np.array([(weights * beta((nodes + 1) / 2 * end)).sum() * end / 2 for end in t])
        np.testing.assert_allclose(s.alpha(t), np.exp(-B / 2), rtol=1e-13)
        np.testing.assert_allclose(s.sigma(t), np.sqrt(1 - np.exp(-B)), rtol=1e-12)
    np.testing.assert_allclose(sub_vp().alpha(t), vp().alpha(t), rtol=1e-15)
    np.testing.assert_allclose(sub_vp().sigma(t), 1 - vp().alpha(t) ** 2, rtol=1e-12)
    np.testing.assert_allclose(cosine(T=None).alpha(t), np.cos(np.pi * t / 2), rtol=1e-13)
    np.testing.assert_allclose(cosine(T=None).sigma(t), np.sin(np.pi * t / 2), rtol=1e-13)
    np.testing.assert_allclose(sigmoid(T=None).alpha(t) ** 2, [sig_bar(r) for r in t], rtol=1e-12)
    np.testing.assert_allclose(sigmoid(T=None).sigma(t) ** 2, [1 - sig_bar(r) for r in t], rtol=1e-11)
    np.testing.assert_array_equal(flow().alpha(t) + flow().sigma(t), 1)
    for s in (ve(), edm()):
        np.testing.assert_array_equal(s.alpha(t), 1)
        np.testing.assert_array_equal(s.sigma(t), t)
    np.testing.assert_allclose(edm().told(np.array([80.0])), math.log(80) / 4, rtol=1e-15)
    for s in (flow(), cosine(T=None), sigmoid(T=None)):
        assert s.alpha(np.array(1.0)) == 0
        assert s.sigma(np.array(0.0)) == 0


@pytest.mark.parametrize("s", ALL, ids=named)
def test_inverse_undoes_u(s):
    t = np.concatenate([np.linspace(0 if s.T else s.t_end, s.t_max, 997), np.arange(0, s.t_max + 1)[: s.T or 1]])
    u = ratio(s.sigma(t), s.alpha(t))
    np.testing.assert_allclose(s.inverse(u), t, rtol=1e-12, atol=2e-12 if s.T else 1e-12)
    if s.T:
        # between steps log u is a straight line, and steps have their own numbers
        half = np.arange(s.T - 1) + 0.5
        middle = np.log(s.sigma(half) / s.alpha(half))
        ends = np.log(s.sigma(np.arange(float(s.T))) / s.alpha(np.arange(float(s.T))))
        np.testing.assert_allclose(middle, (ends[1:] + ends[:-1]) / 2, rtol=0, atol=1e-13)
        np.testing.assert_allclose(s.alpha(half) ** 2 + s.sigma(half) ** 2, 1, rtol=1e-14)
        np.testing.assert_array_equal(s.inverse(np.array([1e9, 1e-9])), [s.T - 1, 0])


@pytest.mark.parametrize("s", [*ALL, linear(T=None), from_betas([0.1, 0.2, 0.5])], ids=named)
def test_spec_builds_the_same_schedule(s):
    again = from_spec(json.loads(json.dumps(s.spec)))
    t = np.linspace(max(s.t_end, 0), s.t_max, 50)
    np.testing.assert_array_equal(again.alpha(t), s.alpha(t))
    np.testing.assert_array_equal(again.sigma(t), s.sigma(t))
    assert again.spec == s.spec
    assert (again.name, again.T, again.t_max, again.t_end, again.prior) == (s.name, s.T, s.t_max, s.t_end, s.prior)


def test_every_named_schedule_has_a_spec():
    assert set(module.NAMED) == {s.name for s in ALL} | {"from_betas", "zero_snr"}
    with pytest.raises(ValueError, match="'quadratic' is not one of linear"):
        from_spec({"name": "quadratic"})


@pytest.mark.parametrize("betas", [[], [0.1, 0.0], [0.1, 1.0], [0.1, -0.2], [[0.1, 0.2]], [0.1, np.nan]])
def test_from_betas_refuses(betas):
    with pytest.raises(ValueError, match=r"inside \(0, 1\)"):
        from_betas(betas)


def test_own_continuous_schedule_by_bisection():
    s = schedule(lambda t: 1 / (1 + t**3), lambda t: t**3 + 0.01 * t, t_max=2.0, t_end=0.01, name="mine")
    t = np.concatenate([[0.0, 2.0], np.geomspace(1e-3, 2, 50)])
    np.testing.assert_allclose(s.inverse(s.sigma(t) / s.alpha(t)), t, rtol=1e-12, atol=1e-15)
    np.testing.assert_array_equal(times(s, 4), np.linspace(2, 0.01, 5))
    assert (s.spec, s.T) == (None, None)
    with pytest.raises(ValueError, match="must increase"):
        schedule(lambda t: 1 + t, lambda t: t * (1 - t))


def test_own_discrete_schedule_with_zero_terminal_snr():
    s = schedule(lambda t: np.sqrt(1 - ((t + 1) / 10) ** 2), lambda t: (t + 1) / 10, T=10)
    grid = levels(s, times(s, 5))
    np.testing.assert_array_equal(grid.t, [9, 7, 5, 3, 1, -1])
    assert grid.u[0] == np.inf
    np.testing.assert_allclose(grid.u[1:], [0.8 / 0.6, 0.75, 0.4 / np.sqrt(0.84), 0.2 / np.sqrt(0.96), 0], rtol=1e-14)
    np.testing.assert_array_equal(s.inverse(grid.u[:-1]), grid.t[:-1])
    with pytest.raises(ValueError, match=r"alpha\^2 \+ sigma\^2 = 1"):
        schedule(lambda t: 1 - (t + 1) / 20, lambda t: (t + 1) / 20, T=10)


def test_zero_snr_is_lin_algorithm_1():
    old = linear()
    new = module.zero_snr(old)
    t = np.arange(1000.0)
    a = old.alpha(t)
    np.testing.assert_allclose(new.alpha(t), (a - a[-1]) * a[0] / (a[0] - a[-1]), rtol=1e-13, atol=1e-17)
    np.testing.assert_allclose(new.alpha(t) ** 2 + new.sigma(t) ** 2, 1, rtol=1e-14)
    assert (new.alpha(t[-1:]), new.sigma(t[-1:])) == (0.0, 1.0)
    again = from_spec(new.spec)
    np.testing.assert_array_equal(again.alpha(t), new.alpha(t))
    assert new.spec == {"name": "zero_snr", "of": old.spec}
    with pytest.raises(ValueError, match="'vp' is continuous; accepted: a discrete schedule"):
        module.zero_snr(module.vp())
