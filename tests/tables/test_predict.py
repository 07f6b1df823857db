from __future__ import annotations

import numpy as np
import pytest

from fastdiff.tables.predict import PREDICTS, direction, predict
from fastdiff.tables.schedule import cosine, flow, linear, ve

rng = np.random.default_rng(0)
X0, EPS = rng.standard_normal((2, 40))


def output(kind, alpha, sigma, previous=None, sigma_data=0.5):
    """F by definition, from x0 and eps; Ho's posterior mean and Karras's D in their own letters."""
    x = alpha * X0 + sigma * EPS
    if kind == "mean":
        abar, abar_s = alpha**2, previous[0] ** 2
        a_t, beta = abar / abar_s, 1 - abar / abar_s
        first = np.sqrt(abar_s) * beta / (1 - abar) * X0
        return first + np.sqrt(a_t) * (1 - abar_s) / (1 - abar) * x
    if kind == "edm":
        y, u, d = x / alpha, sigma / alpha, sigma_data
        return (X0 - d**2 / (u**2 + d**2) * y) * np.sqrt(u**2 + d**2) / (u * d)
    return {
        "eps": EPS,
        "x0": X0,
        "v": alpha * EPS - sigma * X0,
        "flow": EPS - X0,
        "score": -EPS / sigma,
    }[kind]


# the posterior mean belongs to the steps of a discrete schedule
CASES = [(s, kind) for s in (linear(), cosine(), flow(), ve()) for kind in PREDICTS if s.T or kind != "mean"]


@pytest.mark.parametrize(("schedule", "kind"), CASES, ids=lambda c: getattr(c, "name", c))
def test_output_reads_as_x0_and_eps(kind, schedule):
    for t in (1.0, 37.0, 400.0, 998.0) if schedule.T else (0.02, 0.3, 0.9):
        alpha, sigma = schedule.alpha(np.array(t)), schedule.sigma(np.array(t))
        previous = (schedule.alpha(np.array(t - 1)), schedule.sigma(np.array(t - 1))) if kind == "mean" else None
        x = alpha * X0 + sigma * EPS
        F = output(kind, alpha, sigma, previous)
        _, c_skip, c_out = predict(kind, alpha, sigma, previous=previous)
        e_skip, e_out = direction(kind, alpha, sigma, previous=previous)
        # how much reading this F amplifies its rounding
        room = 1e-14 * (1 + np.abs(c_skip * x).max() + np.abs(c_out * F).max())
        if kind == "mean":
            room /= 1 - (alpha / previous[0]) ** 2
        np.testing.assert_allclose(c_skip * x + c_out * F, X0, rtol=0, atol=room)
        room_eps = 1e-14 * (1 + np.abs(e_skip * x).max() + np.abs(e_out * F).max())
        if kind == "mean":
            room_eps /= 1 - (alpha / previous[0]) ** 2
        np.testing.assert_allclose(e_skip * x + e_out * F, EPS, rtol=0, atol=room_eps + room * float(alpha / sigma))


def test_input_scale_is_karras_in_u_and_one_elsewhere():
    alpha, sigma = np.array([1.0, 0.3, 0.0, 0.8]), np.array([3.0, 0.7, 1.0, 0.0])
    c_in, c_skip, c_out = predict("edm", alpha, sigma, sigma_data=0.5)
    some = alpha > 0
    u = sigma[some] / alpha[some]
    np.testing.assert_allclose(c_in[some] * alpha[some], 1 / np.sqrt(u**2 + 0.25), rtol=1e-15)
    np.testing.assert_allclose((c_skip[2], c_out[2], c_in[2]), (0, 0.5, 1), rtol=1e-15)  # pure noise: x0 = sigma_data F
    np.testing.assert_allclose((c_skip[3], c_out[3]), (1 / 0.8, 0), rtol=1e-15)  # clean data: x0 = x/alpha
    for kind in ("eps", "x0", "v", "flow", "score"):
        np.testing.assert_array_equal(predict(kind, alpha[:2], sigma[:2])[0], 1)


def test_pure_noise_is_read_without_dividing_by_alpha():
    zero, one = np.zeros(1), np.ones(1)
    x0, z = X0[:1], EPS[:1]
    for kind, F in (("v", -x0), ("flow", z - x0), ("x0", x0)):
        _, c_skip, c_out = predict(kind, zero, one)
        np.testing.assert_allclose(c_skip * z + c_out * F, x0, rtol=1e-14)
    # Ho eq. 7 with a_t = 0: the mean is alpha_s x0
    _, c_skip, c_out = predict("mean", zero, one, previous=(np.array([0.8]), np.array([0.6])))
    np.testing.assert_allclose((c_skip[0], c_out[0]), (0, 1 / 0.8), rtol=1e-15)
    for kind in ("eps", "score"):
        with pytest.raises(ValueError, match=f"{kind}-prediction says nothing about x0 at alpha = 0"):
            predict(kind, zero, one)


def test_errors_name_what_is_accepted():
    with pytest.raises(ValueError, match="predicts='noise' is not one of eps, x0, v"):
        predict("noise", 0.8, 0.6)
    with pytest.raises(ValueError, match="needs previous="):
        predict("mean", 0.8, 0.6)
